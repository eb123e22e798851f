"""Every form but the low-rank one as plain parts: named tensors and a few values each.

The low-rank form has a layout of its own in the image, because kernels read it by row number. All others are rare or
small; a part is written as it is, and read back as the same form over views of the image.

    {"form": "changes", "path": "model.layers.0.mlp.down_proj", "tensors": {"gain": [offset, [512]]}, "values": {}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch

from peft_core.forms import (
    AdapterForms,
    Bottleneck,
    EmbeddingChange,
    ExpertDelta,
    HeadRows,
    KVPrefix,
    LinearDelta,
    NormWeights,
    SiteChange,
    VirtualTokens,
)

_KEYED: Mapping[str, type[Any]] = {
    "changes": SiteChange,
    "embeddings": EmbeddingChange,
    "head_rows": HeadRows,
    "norms": NormWeights,
    "bottlenecks": Bottleneck,
    "experts": ExpertDelta,
}
_SINGLE: Mapping[str, type[Any]] = {"prefix": KVPrefix, "virtual": VirtualTokens}

Append = Callable[[torch.Tensor, str], int]  # (tensor, what it is) -> offset in elements


def write_parts(forms: AdapterForms, append: Append) -> list[dict[str, Any]]:
    """Append every tensor of every part; returns what `read_parts` needs, as JSON data."""
    return [_write(name, path, form, append) for name, path, form in _parts(forms)]


def read_parts(
    header: Mapping[str, Any], elements: torch.Tensor, linear: Mapping[str, LinearDelta] | None = None
) -> AdapterForms:
    """The forms over views of `elements` [num_elements], the payload of the image."""
    forms: dict[str, Any] = {name: {} for name in _KEYED}
    for part in header["parts"]:
        name = part["form"]
        if name in _SINGLE:
            forms[name] = _read(_SINGLE[name], part, elements)
        else:
            forms[name][part["path"]] = _read(_KEYED[name], part, elements)
    return AdapterForms(
        linear=linear or {},
        **forms,
        invocation_tokens=tuple(header["invocation_tokens"]),
        vocab_size=header["vocab_size"],
    )


def extents(header: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(offset, size) in elements of every tensor of every part."""
    for part in header["parts"]:
        for offset, shape in part["tensors"].values():
            yield offset, int(torch.Size(shape).numel())


def _parts(forms: AdapterForms) -> Iterator[tuple[str, str, Any]]:
    for name in _KEYED:
        for path, form in getattr(forms, name).items():
            yield name, path, form
    for name in _SINGLE:
        form = getattr(forms, name)
        if form is not None:
            yield name, "", form


def _write(name: str, path: str, form: Any, append: Append) -> dict[str, Any]:
    tensors, values = {}, {}
    for field in fields(form):
        value = getattr(form, field.name)
        if isinstance(value, torch.Tensor):
            tensors[field.name] = [append(value, f"{path or name}.{field.name}"), list(value.shape)]
        elif value is not None:
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return {"form": name, "path": path, "tensors": tensors, "values": values}


def _read(kind: type[Any], part: Mapping[str, Any], elements: torch.Tensor) -> Any:
    tensors = {
        name: elements[offset : offset + int(torch.Size(shape).numel())].view(shape)
        for name, (offset, shape) in part["tensors"].items()
    }
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in part["values"].items()}
    return kind(**tensors, **values)
