"""What happens to body fields that no schema knows: nothing is accepted and ignored in silence.

    a field of another dialect, or in the wrong place   refused, with the field to use
    one or two letters from a field we know             refused, with that field
    a name with "adapter", "lora" or "model" in it      refused: it would change which weights answer
    anything else                                       told in the header x-veneer-ignored-fields, and counted

Running example: {"inputs": "Hi", "parameters": {"temprature": 1.2, "customer": "acme"}}
    "temprature" -> Invalid("unknown field `parameters.temprature`; did you mean `temperature`?")
    "customer"   -> x-veneer-ignored-fields: parameters.customer
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel

from server.api.errors import Invalid

IGNORED_FIELDS_HEADER = "x-veneer-ignored-fields"
_WEIGHTY = ("adapter", "lora", "model")
_MAX_TOLD = 20
_MAX_NAME_CHARS = 60

# What other dialects call it -> where it lives here.
_TRANSLATIONS = {
    "prompt": "inputs",
    "input": "inputs",
    "text": "inputs",
    "max_tokens": "parameters.max_new_tokens",
    "max_length": "parameters.max_new_tokens",
    "max_completion_tokens": "parameters.max_new_tokens",
    "min_length": "parameters.min_new_tokens",
    "stop_sequences": "parameters.stop",
    "ignore_eos": "parameters.ignore_eos_token",
    "logprobs": "parameters.details",
    "n": "parameters.best_of",
}


def judge(body: BaseModel, nested: str, nested_type: type[BaseModel]) -> tuple[str, ...]:
    """Names of the fields to tell as ignored. `nested` is the body's field that holds the rest of the fields.

    Raises:
        Invalid: a field that must not be ignored, with the one that was probably meant.
    """
    outer, inner = type(body).model_fields, nested_type.model_fields
    ignored = []
    for name in body.model_extra or {}:
        if name in inner:
            raise Invalid(f"unknown field `{_short(name)}`; it belongs in `{nested}`.")
        ignored.append(_judge_one(name, "", [*outer, *inner]))
    part: BaseModel | None = getattr(body, nested)
    for name in (part.model_extra if part is not None else None) or {}:
        if name in outer:
            raise Invalid(f"unknown field `{nested}.{_short(name)}`; it belongs at the top level of the body.")
        ignored.append(_judge_one(name, nested + ".", inner))
    return tuple(ignored)


def header_value(ignored: Iterable[str]) -> str:
    """The names as one header value: ASCII, bounded in length."""
    names = list(ignored)
    told = [_short(name) for name in names[:_MAX_TOLD]]
    if len(names) > _MAX_TOLD:
        told.append(f"and {len(names) - _MAX_TOLD} more")
    return ", ".join(told)


def edit_distance(left: str, right: str, limit: int) -> int:
    """Letters to insert, delete or replace to turn one word into the other; `limit + 1` when it is more."""
    if abs(len(left) - len(right)) > limit:
        return limit + 1
    row = list(range(len(right) + 1))
    for i, letter in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return min(row[-1], limit + 1)


def _judge_one(name: str, prefix: str, known: Iterable[str]) -> str:
    shown = f"`{prefix}{_short(name)}`"
    if name.lower() in _TRANSLATIONS:
        raise Invalid(f"unknown field {shown}; here it is called `{_TRANSLATIONS[name.lower()]}`.")
    # Two edits turn any word of two letters into another: short names must be nearer.
    near = [field for field in known if edit_distance(name.lower(), field, 2) <= min(2, len(name) - 1)]
    if near:
        best = min(near, key=lambda field: edit_distance(name.lower(), field, 2))
        raise Invalid(f"unknown field {shown}; did you mean `{best}`?")
    if any(word in name.lower() for word in _WEIGHTY):
        raise Invalid(f"unknown field {shown}; the adapter is named by `adapter` at the top level of the body.")
    return prefix + name


def _short(name: str) -> str:
    """Printable ASCII, bounded: it goes into messages and headers."""
    clean = "".join(letter if " " < letter < "\x7f" and letter not in '`,"\\' else "?" for letter in name)
    return clean[:_MAX_NAME_CHARS]
