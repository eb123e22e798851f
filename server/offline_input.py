"""What an offline run is asked: prompts from the command line, a text file, or JSON lines.

    {"prompt": "Preheat the oven", "adapter": "pirate", "max_new_tokens": 20, "id": "a7"}

A JSON line must have `prompt` (text, or a list of token ids); `adapter` names one of the run's adapters, null is the
base; `task_id` is for adapters of several tasks; `max_new_tokens`, `seed` and `stop` override the run's own; `id` is
handed through. Anything else is refused, so that no misspelt field is a default. A bad line is an answer of its own
kind, never the end of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from server.engine.request import SamplingParams
from server.front.text import TextRequest, draw_seed


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for every prompt that does not say otherwise."""

    params: SamplingParams
    seed: int | None = None  # of the first prompt, counting up; None: drawn for each
    stop: tuple[str, ...] = ()
    include_stop: bool = True
    echo: bool = False
    adapters: tuple[str, ...] = ()  # names that this run knows


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of the run: a request, or why there is none."""

    index: int
    request: TextRequest | None
    error: str | None = None
    id: Any = None


def from_prompts(prompts: Iterable[str], defaults: Defaults) -> Iterator[Asked]:
    """Every prompt on every adapter of the run, in this order; on the base if there is no adapter."""
    names = defaults.adapters or (None,)
    pairs = ((prompt, name) for prompt in prompts for name in names)
    for index, (prompt, name) in enumerate(pairs):
        yield Asked(index, _request(prompt, name, defaults, index, {}))


def from_text(lines: Iterable[str], defaults: Defaults) -> Iterator[Asked]:
    """One prompt a line; empty lines are skipped."""
    stripped = (line.rstrip("\r\n") for line in lines)
    return from_prompts((line for line in stripped if line.strip()), defaults)


def from_json_lines(lines: Iterable[str], defaults: Defaults) -> Iterator[Asked]:
    """One object a line; empty lines are skipped."""
    filled = (line for line in lines if line.strip())
    for index, line in enumerate(filled):
        handed_through: Any = None
        try:
            data = json.loads(line)
            handed_through = data.pop("id", None) if isinstance(data, dict) else None
            yield Asked(index, _parse(data, defaults, index), id=handed_through)
        except ValueError as error:
            yield Asked(index, None, str(error), handed_through)


def _parse(data: Any, defaults: Defaults, index: int) -> TextRequest:
    """Raises ValueError with what is wrong with the line."""
    if not isinstance(data, dict):
        raise ValueError(f'a line must be a JSON object like {{"prompt": "..."}}, not {type(data).__name__}')
    unknown = sorted(set(data) - {"prompt", "adapter", *_OVERRIDES})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; a line may have prompt, adapter, id, {', '.join(_OVERRIDES)}")
    prompt = data.get("prompt")
    if isinstance(prompt, list) and all(_is_int(item) for item in prompt):
        prompt = tuple(prompt)
    if not isinstance(prompt, str | tuple):
        raise ValueError("`prompt` is missing; it must be a text or a list of token ids")
    for name, (is_good, expected) in _OVERRIDES.items():
        if name in data and not is_good(data[name]):
            raise ValueError(f"`{name}` is {data[name]!r}; it must be {expected}")
    return _request(prompt, _adapter_of(data, defaults), defaults, index, data)


def _adapter_of(data: dict[str, Any], defaults: Defaults) -> str | None:
    known = defaults.adapters
    if "adapter" not in data and len(known) <= 1:
        return known[0] if known else None
    name = data.get("adapter")
    if name is None and "adapter" in data:
        return None
    names = ", ".join(known) or "none"
    if name is None:
        raise ValueError(f"`adapter` is missing and this run has several: {names}; null asks for the base")
    if name not in known:
        raise ValueError(f"unknown adapter {name!r}; this run has {names}, and null is the base")
    return str(name)


def _request(
    prompt: str | tuple[int, ...], adapter: str | None, defaults: Defaults, index: int, overrides: dict[str, Any]
) -> TextRequest:
    seed = draw_seed() if defaults.seed is None else defaults.seed + index
    params = replace(
        defaults.params,
        max_new_tokens=overrides.get("max_new_tokens", defaults.params.max_new_tokens),
        seed=overrides.get("seed", seed),
    )
    return TextRequest(
        prompt,
        params,
        adapter,
        overrides.get("task_id"),
        stop=tuple(overrides.get("stop", defaults.stop)),
        include_stop=defaults.include_stop,
        echo=defaults.echo,
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_OVERRIDES: dict[str, tuple[Any, str]] = {
    "task_id": (lambda value: value is None or (_is_int(value) and value >= 0), "a whole number from 0"),
    "max_new_tokens": (lambda value: _is_int(value) and value >= 1, "a whole number from 1"),
    "seed": (lambda value: _is_int(value) and 0 <= value < 2**63, "a whole number from 0"),
    "stop": (
        lambda value: isinstance(value, list) and all(isinstance(item, str) and item for item in value),
        "a list of texts",
    ),
}
