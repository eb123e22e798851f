"""The forms of one adapter, put together from parts that were read apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from peft_core.forms import AdapterForms


def merged(first: AdapterForms, second: AdapterForms) -> AdapterForms:
    """The forms of both. Two changes of one module are put together; their shifts are added.

    The sum is what is meant where a kind changes a module whose bias is replaced as well, unless the kind's gain takes
    the bias along: that kind must scale the replaced bias itself.
    """
    values: dict[str, Any] = {}
    for part in fields(AdapterForms):
        a, b = getattr(first, part.name), getattr(second, part.name)
        values[part.name] = _joined_maps(a, b) if isinstance(a, Mapping) else _either(part.name, a, b)
    return AdapterForms(**values)


def _joined_maps(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    both = {path: _joined(a[path], b[path]) for path in a if path in b}
    return {**a, **b, **both}


def _joined(a: Any, b: Any) -> Any:
    values = {part.name: _either(part.name, getattr(a, part.name), getattr(b, part.name)) for part in fields(a)}
    return replace(a, **values)


def _either(name: str, a: Any, b: Any) -> Any:
    """Whichever is given; both only of a shift, or where they are the same."""
    if name == "shift" and a is not None and b is not None:
        return a + b
    if _is_absent(a):
        return b
    assert _is_absent(b) or (not isinstance(a, torch.Tensor) and a == b), f"two values of {name} at one module"
    return a


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, tuple | int) and not value)
