"""Reads and distrusts the header of a safetensors file, without touching a byte of tensor data.

    file   = length N (8 bytes, little endian) + header (N bytes of JSON) + data
    header = {"__metadata__": {str: str}?, tensor name: {"dtype", "shape", "data_offsets": [start, end]}, ...}
    (https://github.com/huggingface/safetensors#format)

Accepted means: every byte of data belongs to exactly one tensor, and dtype, shape and range agree. Whoever reads the
tensors later uses these entries, so no second parser can understand the file differently.

Running example: one F32 tensor "a" of shape [2, 3] in a file of 8 + 64 + 24 bytes
    Header(tensors={"a": TensorEntry("F32", (2, 3), 0, 24)}, metadata={}, data_start=72, file_bytes=96)
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from adapters_store.errors import InvalidHeader

_DTYPES_BY_BYTES = {
    8: ("F64", "I64", "U64"),
    4: ("F32", "I32", "U32"),
    2: ("F16", "BF16", "I16", "U16"),
    1: ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
}
DTYPE_BYTES: Mapping[str, int] = {dtype: size for size, dtypes in _DTYPES_BY_BYTES.items() for dtype in dtypes}

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_MAX_NAME_CHARS = 512
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """What an honest adapter never needs more of."""

    max_header_bytes: int = 8 * 1024 * 1024
    max_tensors: int = 50_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    start: int  # bytes, relative to Header.data_start
    end: int  # exclusive

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    tensors: Mapping[str, TensorEntry]  # in file order
    metadata: Mapping[str, str]
    data_start: int  # bytes from the beginning of the file
    file_bytes: int


def read_header(path: Path, limits: HeaderLimits | None = None) -> Header:
    """The checked header of a file.

    Raises:
        InvalidHeader: the file is cut short, or its header is not well-formed, or lies.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return parse_header(file, os.fstat(file.fileno()).st_size, limits or HeaderLimits())


def parse_header(file: BinaryIO, file_bytes: int, limits: HeaderLimits) -> Header:
    """As `read_header`, from the beginning of an open file of known size."""
    if file_bytes < _LENGTH_BYTES:
        raise InvalidHeader(f"the file has {file_bytes} bytes; a safetensors file has at least {_LENGTH_BYTES}.")
    num_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if num_bytes > limits.max_header_bytes:
        raise InvalidHeader(
            f"the header announces {num_bytes} bytes; the limit is {limits.max_header_bytes}. "
            "This is not a safetensors file, or its beginning is damaged."
        )
    data_start = _LENGTH_BYTES + num_bytes
    if data_start > file_bytes:
        raise InvalidHeader(
            f"the header announces {num_bytes} bytes, but only {file_bytes - _LENGTH_BYTES} follow: "
            "the file is truncated. Upload it again."
        )
    fields = _parse_json(file.read(num_bytes))
    metadata = _check_metadata(fields.pop(_METADATA, {}))
    if len(fields) > limits.max_tensors:
        raise InvalidHeader(f"the header lists {len(fields)} tensors; the limit is {limits.max_tensors}.")
    tensors = {name: _check_entry(name, entry) for name, entry in fields.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_tiling(ordered, file_bytes - data_start)
    return Header(ordered, metadata, data_start, file_bytes)


def _parse_json(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise InvalidHeader("the header does not begin with '{': this is not a safetensors file.")
    try:
        return _expect_object(
            json.loads(text.decode("utf-8"), object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
        )
    except RecursionError as error:
        raise InvalidHeader("the header is nested too deeply to be a safetensors header.") from error
    except ValueError as error:  # JSON and UTF-8 errors, integers of absurd length
        raise InvalidHeader(f"the header is not valid JSON: {str(error)[:200]}") from error


def _expect_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidHeader("the header is not a JSON object.")
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    raise InvalidHeader(f"the header names {_show(twice)} twice; which one is meant cannot be known.", _clean(twice))


def _refuse_constant(text: str) -> NoReturn:
    raise InvalidHeader(f"the header holds {text}, which is not JSON.")


def _check_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise InvalidHeader(f"{_METADATA} must map text to text.")
    return value


def _check_entry(name: str, entry: object) -> TensorEntry:
    _check_tensor_name(name)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise InvalidHeader(f"tensor {_show(name)} must have exactly dtype, shape and data_offsets.", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InvalidHeader(f"tensor {_show(name)} has the unknown dtype {_show(dtype)}.", name)
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise InvalidHeader(
            f"tensor {_show(name)} has the shape {_show(shape)}; expected up to {_MAX_DIMENSIONS} sizes >= 0.", name
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidHeader(f"tensor {_show(name)} has data_offsets {_show(offsets)}; expected [start, end].", name)
    start, end = offsets
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - start != num_bytes:
        raise InvalidHeader(
            f"tensor {_show(name)} occupies {end - start} bytes, but {dtype} {list(shape)} needs {_show(num_bytes)}.",
            name,
        )
    return TensorEntry(dtype, tuple(shape), start, end)


def _check_tensor_name(name: str) -> None:
    if not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        raise InvalidHeader(
            f"{_show(name)} is no tensor name: 1 to {_MAX_NAME_CHARS} printable characters.", _clean(name)
        )


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_tiling(tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    position = 0
    for name, entry in tensors.items():
        if entry.start != position:
            what = (
                "overlaps the tensor before it" if entry.start < position else "leaves bytes that belong to no tensor"
            )
            raise InvalidHeader(f"tensor {_show(name)} starts at {entry.start}, expected {position}: it {what}.", name)
        position = entry.end
        if position > data_bytes:
            raise InvalidHeader(
                f"tensor {_show(name)} ends at byte {position} of the data, but the file has only {data_bytes}: "
                "it is truncated. Upload it again.",
                name,
            )
    if position != data_bytes:
        raise InvalidHeader(f"{data_bytes - position} bytes after the last tensor belong to no tensor.")


def _show(value: object) -> str:
    """`value` in a message: short, quoted, printable whatever it is."""
    if isinstance(value, str):
        return ascii(value[:100])
    if type(value) is int and value.bit_length() <= 128:
        return str(value)
    if isinstance(value, list) and all(type(item) is int for item in value):
        return f"[{', '.join(_show(item) for item in value[:9])}{', ...' * (len(value) > 9)}]"
    return f"an unusable {type(value).__name__}"


def _clean(name: str) -> str:
    return name[:_MAX_NAME_CHARS].encode("ascii", "backslashreplace").decode("ascii")
