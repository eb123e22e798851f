"""Shapes of a module's tensors, held against the base and against each other.

Running example: a module with 64 inputs and 128 outputs
    shape_of(header, "...hada_w1_a", site, ("out", None))     -> (128, 4)     None: any size above 0
    shape_of(header, "...hada_w1_b", site, (4, "in"))         -> (4, 64)
    shape_of(header, "...gralora_A", site, (2, ("in", 2), 8)) -> (2, 32, 8)   half of the inputs
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch

from peft_core.errors import BaseMismatch, MalformedAdapter
from peft_core.methods.tensors import FLOAT_DTYPES, Header, TensorSource, read_finite
from peft_core.spec import Site

Side = Literal["in", "out"]
Dimension = int | None | Side | tuple[Side, int]  # a number, anything, a side of the module, a part of a side
INTEGER_DTYPES = ("U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


def shape_of(
    header: Header,
    name: str,
    site: Site | None,
    dimensions: Collection[Dimension],
    *,
    dtypes: Collection[str] = FLOAT_DTYPES,
) -> tuple[int, ...]:
    """The shape of a tensor that must have these dimensions, none of them empty where it is said as None.

    Args:
        site: the module that the tensor belongs to; None for one that all modules share (no sides then).

    Raises:
        MalformedAdapter: another dtype or number of dimensions, or a size that contradicts
            another tensor or the config.
        BaseMismatch: a side of the module has another size.
    """
    entry = header[name]
    if entry.dtype not in dtypes:
        raise MalformedAdapter(
            f'tensor "{name}" has dtype {entry.dtype}; expected one of {", ".join(dtypes)}. Save the adapter again.',
            tensor=name,
        )
    shape = tuple(entry.shape)
    expected = [_size(dimension, site) for dimension in dimensions]
    if len(shape) != len(expected) or any(want is None and got < 1 for want, got in zip(expected, shape, strict=True)):
        raise MalformedAdapter(
            f'tensor "{name}" has shape {list(shape)}; expected {_told(expected)}. '
            "The file is damaged or was written by another tool; save the adapter again.",
            tensor=name,
        )
    for dimension, want, got in zip(dimensions, expected, shape, strict=True):
        if want is None or want == got:
            continue
        if isinstance(dimension, int):
            raise MalformedAdapter(
                f'tensor "{name}" has shape {list(shape)}; its config and its other tensors need {_told(expected)}. '
                "The file is damaged, or its config was changed; save the adapter again.",
                tensor=name,
            )
        raise BaseMismatch(
            f'tensor "{name}" has shape {list(shape)}; "{site.path if site else ""}" of this base needs '
            f"{_told(expected)}. Use the base that the adapter was trained on.",
            tensor=name,
        )
    return shape


def read_tensor(source: TensorSource, name: str) -> torch.Tensor:
    """One tensor on the host: float32, or int64 where the file holds integers.

    Raises:
        MalformedAdapter: its shape is not the header's, or a value is NaN or infinite.
    """
    if source.header[name].dtype not in INTEGER_DTYPES:
        return read_finite(source, name)
    tensor = source.get(name).to(torch.int64)
    if tuple(tensor.shape) != tuple(source.header[name].shape):
        raise MalformedAdapter(
            f'tensor "{name}" has shape {list(tensor.shape)}, but the header announced '
            f"{list(source.header[name].shape)}. The file is damaged; upload it again.",
            tensor=name,
        )
    return tensor.contiguous()


def require_indices(values: torch.Tensor, limit: int, name: str) -> torch.Tensor:
    """The values, which must be in [0, limit).

    Raises:
        MalformedAdapter: one is not.
    """
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= limit):
        raise MalformedAdapter(
            f'tensor "{name}" holds indices from {int(values.min())} to {int(values.max())}; only 0 to {limit - 1} '
            "exist. The file is damaged; save the adapter again.",
            tensor=name,
        )
    return values


def _size(dimension: Dimension, site: Site | None) -> int | None:
    if dimension is None or isinstance(dimension, int):
        return dimension
    side, parts = dimension if isinstance(dimension, tuple) else (dimension, 1)
    assert site is not None, "a shared tensor has no sides"
    return (site.in_features if side == "in" else site.out_features) // parts


def _told(sizes: Collection[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"
