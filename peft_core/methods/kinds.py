"""The kinds of adapters that exist and are not served, each with its own sentence.

Kinds are those of PEFT 0.21 (`peft_type`) and the two other formats that use the same file name,
`adapter_config.json`: AdapterHub's `adapters` library and MLX. They are told apart by keys, never by file name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from peft_core.errors import MalformedAdapter, UnsupportedAdapter

CODE = "unsupported_peft_type"
ADAPTERHUB = "ADAPTERHUB"  # no `peft_type` says it: the config has another structure

# What follows `peft_type "X": `. "not served yet" may come; the others cannot be served in a shared batch at all.
_LATER: Mapping[str, str] = {
    "ADAPTION_PROMPT": "adaption prompts (LLaMA-Adapter)",
}
_NEVER: Mapping[str, str] = {
    "ADAMSS": "AdaMSS stores no row indices, so its update cannot be rebuilt from the file.",
    "LILY": "Lily's output for one request depends on the others in its batch.",
    "SHADOW": "Shadow needs a second backbone with a state of its own.",
    "XLORA": "X-LoRA mixes other adapters, which its file only names by path. Serve those adapters.",
}

REFUSED_KINDS = frozenset({*_LATER, *_NEVER})


def kind_of(config: Mapping[str, Any]) -> str:
    """The `peft_type` of a config, or ADAPTERHUB for one that AdapterHub's library wrote.

    Raises:
        UnsupportedAdapter: the config is of another library, named in the message.
        MalformedAdapter: there is no `peft_type`, and nothing else tells the kind.
    """
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind:
        return kind
    if "fine_tune_type" in config or "lora_parameters" in config:
        _refuse("an MLX adapter", config.get("fine_tune_type"), "fine_tune_type")
    version = config.get("version")
    if "config" in config and ("model_type" in config or str(version).startswith("adapters.")):
        return ADAPTERHUB
    raise MalformedAdapter(
        'adapter_config.json has no "peft_type", so nothing says what kind of adapter this is. '
        "Save the adapter with PEFT's save_pretrained.",
        field="peft_type",
        value=kind,
    )


def refuse_kind(kind: str, served: tuple[str, ...]) -> NoReturn:
    """Raises UnsupportedAdapter with the sentence of a kind that is not among the served ones."""
    advice = f"Served kinds: {', '.join(served)}."
    if kind in _LATER:
        sentence = f"{_LATER[kind]} is not served yet. {advice}"
    elif kind in _NEVER:
        sentence = f"{_NEVER[kind]} It is not served. {advice}"
    else:
        sentence = f"this kind is unknown here. {advice}"
    raise UnsupportedAdapter(f'peft_type "{kind}": {sentence}', code=CODE, field="peft_type", value=kind)


def _refuse(what: str, value: object, field: str) -> NoReturn:
    raise UnsupportedAdapter(
        f"this is {what}, whose format is not served. Convert it: `veneer adapters convert SRC DST`.",
        code=CODE,
        field=field,
        value=value,
    )
