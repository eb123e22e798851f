"""The tensors of one checked safetensors file, read one at a time.

The entries come from `adapters_store.header`, which trusts nothing; no other parser sees the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from adapters_store.errors import InvalidHeader
from adapters_store.header import TensorEntry, read_header
from peft_core.methods.tensors import Header

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CHUNK_BYTES = 1 << 20


class TensorFile:
    """A `peft_core.methods.TensorSource` over a file."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidHeader, OSError."""
        self._path = path
        self._checked = read_header(path)

    @property
    def header(self) -> Header:
        return self._checked.tensors

    def entry(self, name: str) -> TensorEntry:
        return self._checked.tensors[name]

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the host, in memory of its own. Raises InvalidHeader if the file has become shorter."""
        entry = self.entry(name)
        buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
        with self._path.open("rb") as file:
            file.seek(self._checked.data_start + entry.start)
            if file.readinto(buffer.numpy().data) != entry.num_bytes:
                raise _cut_short(name)
        return buffer.view(_TORCH_DTYPES[entry.dtype]).reshape(entry.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor as they are stored, in pieces. Raises as `get`."""
        entry = self.entry(name)
        left = entry.num_bytes
        with self._path.open("rb") as file:
            file.seek(self._checked.data_start + entry.start)
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise _cut_short(name)
                left -= len(chunk)
                yield chunk


def _cut_short(name: str) -> InvalidHeader:
    return InvalidHeader(f"tensor {name!r} cannot be read whole: the file was cut short while it was read.", name)
