"""How a decoder sees an adapter's tensors: a header first, data one tensor at a time.

Who stores the tensors, and where, is not known here: a file, an archive member and a dictionary in a test all serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from peft_core.errors import MalformedAdapter

FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")  # as safetensors spells them


class TensorShape(Protocol):
    """What a header says of one tensor."""

    @property
    def dtype(self) -> str: ...  # as safetensors spells it: "F32", "BF16", ...

    @property
    def shape(self) -> tuple[int, ...]: ...


Header = Mapping[str, TensorShape]  # by tensor name


class TensorSource(Protocol):
    """The tensors of one adapter; `get` may read a file, each time."""

    @property
    def header(self) -> Header: ...

    def get(self, name: str) -> torch.Tensor: ...


def require_matrix(header: Header, name: str) -> tuple[int, int]:
    """The two dimensions of a tensor that must be a float matrix without an empty side.

    Raises:
        MalformedAdapter: it is something else.
    """
    entry = header[name]
    if entry.dtype not in FLOAT_DTYPES:
        raise MalformedAdapter(
            f'tensor "{name}" has dtype {entry.dtype}; expected one of {", ".join(FLOAT_DTYPES)}. '
            "Save the adapter in a floating-point type.",
            tensor=name,
        )
    if len(entry.shape) != 2 or min(entry.shape) < 1:
        raise MalformedAdapter(
            f'tensor "{name}" has shape {list(entry.shape)}; expected two dimensions, neither of them empty. '
            "The file is damaged or was written by another tool; save the adapter again.",
            tensor=name,
        )
    return entry.shape[0], entry.shape[1]


def read_finite(source: TensorSource, name: str) -> torch.Tensor:
    """One tensor in float32 on the host.

    Raises:
        MalformedAdapter: its shape is not the header's, or a value is NaN or infinite.
    """
    tensor = source.get(name)
    expected = tuple(source.header[name].shape)
    if tuple(tensor.shape) != expected:
        raise MalformedAdapter(
            f'tensor "{name}" has shape {list(tensor.shape)}, but the header announced {list(expected)}. '
            "The file is damaged; upload it again.",
            tensor=name,
        )
    values = tensor.to(torch.float32)
    require_finite(values, name)
    return values.contiguous()


def require_finite(values: torch.Tensor, name: str) -> None:
    """Raises MalformedAdapter, naming the tensor, where a value is NaN or infinite."""
    if bool(torch.isfinite(values).all()):
        return
    num_bad = int((~torch.isfinite(values)).sum())
    raise MalformedAdapter(
        f'tensor "{name}" holds {num_bad} of {values.numel()} values that are NaN, infinite or beyond float32. '
        "Training has diverged or the file is damaged; use an earlier checkpoint.",
        tensor=name,
    )
