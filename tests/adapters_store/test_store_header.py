from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from adapters_store.errors import InvalidHeader
from adapters_store.header import Header, HeaderLimits, TensorEntry, parse_header, read_header
from tests.adapters_store.store_samples import safetensors_bytes, weights


def read(data: bytes, limits: HeaderLimits | None = None) -> Header:
    return parse_header(io.BytesIO(data), len(data), limits or HeaderLimits())


def file_with(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def by_the_reference(data: bytes) -> dict[str, Any]:
    return dict(deserialize(data))  # type: ignore[no-untyped-call]


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_a_well_formed_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(weights())
    header = read_header(path)
    assert header.tensors == {"a": TensorEntry("F32", (2, 3), 0, 24), "b": TensorEntry("BF16", (4,), 24, 32)}
    assert header.file_bytes == header.data_start + 32


def test_metadata_scalars_and_empty_tensors_are_well_formed() -> None:
    header = read(
        file_with(
            {"__metadata__": {"format": "pt"}, "s": entry(shape=[]), "e": entry(shape=[0, 5], offsets=[4, 4])}, b"1234"
        )
    )
    assert header.metadata == {"format": "pt"}
    assert header.tensors["s"].num_bytes == 4
    assert header.tensors["e"].num_bytes == 0


def test_padding_after_the_json_is_well_formed() -> None:
    assert read(file_with(json.dumps({"a": entry()}).encode() + b"   ", b"1234")).tensors.keys() == {"a"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "at least 8"),
        (b"\x01\x00", "at least 8"),
        (struct.pack("<Q", 2**63), "limit"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (file_with(b"[]"), "does not begin"),
        (file_with(b"PK\x03\x04"), "does not begin"),
        (file_with(b'{"a": '), "not valid JSON"),
        (file_with(b'{"a": "\xff"}'), "not valid JSON"),
        (file_with(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', b"1234"), "not JSON"),
        (file_with(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
        (file_with(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (file_with({"__metadata__": {"a": 1}}), "__metadata__"),
        (file_with({"__metadata__": []}), "__metadata__"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidHeader, match=message):
        read(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t": []}, "exactly"),
        ({"t": {"dtype": "F32", "shape": [1]}}, "exactly"),
        ({"t": entry(more=1)}, "exactly"),
        ({"t": entry(dtype="F31")}, "unknown dtype"),
        ({"t": entry(dtype=["F32"])}, "unknown dtype"),
        ({"t": entry(shape=[-1])}, "shape"),
        ({"t": entry(shape=[1.0])}, "shape"),
        ({"t": entry(shape=[True])}, "shape"),
        ({"t": entry(shape="1")}, "shape"),
        ({"t": entry(shape=[1] * 9)}, "shape"),
        ({"t": entry(shape=[[[1]]])}, "shape"),
        ({"t": entry(shape=[2**63])}, "shape"),
        ({"t": entry(offsets=[4, 0])}, "data_offsets"),
        ({"t": entry(offsets=[0])}, "data_offsets"),
        ({"t": entry(offsets=[0, 4, 8])}, "data_offsets"),
        ({"t": entry(shape=[2])}, "needs 8"),
        ({"t": entry(shape=[2**62, 2**62, 2**62])}, "needs"),
        ({"t": entry(offsets=[4, 8])}, "leaves bytes"),
        ({"t": entry(shape=[2], offsets=[0, 8])}, "truncated"),
        ({"first": entry(), "t": entry(offsets=[0, 4])}, "overlaps"),
        ({"first": entry(), "t": entry(shape=[1], offsets=[2, 6])}, "overlaps"),
    ],
)
def test_a_tensor_that_lies_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidHeader, match=message) as caught:
        read(file_with(fields, b"1234"))
    assert caught.value.tensor == "t"
    assert "'t'" in str(caught.value)


def test_bytes_behind_the_last_tensor_are_refused() -> None:
    with pytest.raises(InvalidHeader, match="after the last tensor"):
        read(weights() + b"x")


def test_a_name_that_comes_twice_is_refused() -> None:
    one = '"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    with pytest.raises(InvalidHeader, match="twice") as caught:
        read(file_with(f"{{{one}, {one}}}".encode(), b"1234"))
    assert caught.value.tensor == "t"


@pytest.mark.parametrize("name", ["", "x" * 513, "a\nb", "a\x00b", "\ud800", "a\u202eb"])
def test_a_tensor_name_that_cannot_be_shown_is_refused(name: str) -> None:
    with pytest.raises(InvalidHeader, match="no tensor name") as caught:
        read(file_with({name: entry()}, b"1234"))
    str(caught.value).encode()


def test_every_truncation_of_a_good_file_is_refused() -> None:
    whole = weights()
    for length in range(len(whole)):
        with pytest.raises(InvalidHeader):
            read(whole[:length])
    assert read(whole).tensors  # the whole file is good, so it was the cut that was refused


def test_caps_on_header_and_tensors_hold() -> None:
    with pytest.raises(InvalidHeader, match="limit is 10"):
        read(weights(), HeaderLimits(max_header_bytes=10))
    with pytest.raises(InvalidHeader, match="limit is 1"):
        read(weights(), HeaderLimits(max_tensors=1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F4"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | json_values,
    }
)


@given(header=json_values | st.dictionaries(st.text(max_size=4), entries, max_size=3), data=st.binary(max_size=40))
@example(header={"a": entry()}, data=b"1234")
def test_any_json_is_read_or_refused_and_never_more_trusted_than_by_the_reference_reader(
    header: object, data: bytes
) -> None:
    whole = file_with(header, data)
    try:
        ours = read(whole)
    except InvalidHeader:
        return
    theirs = by_the_reference(whole)
    assert {name: (item.dtype, list(item.shape)) for name, item in ours.tensors.items()} == {
        name: (item["dtype"], item["shape"]) for name, item in theirs.items()
    }


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read(data)
    except InvalidHeader:
        return
    by_the_reference(data)


@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_one_changed_byte_is_harmless_or_refused(position: int, value: int) -> None:
    whole = bytearray(safetensors_bytes({"a": ("F32", [2], b"12345678"), "b": ("U8", [3], b"abc")}))
    whole[position % len(whole)] = value
    try:
        read(bytes(whole))
    except InvalidHeader:
        return
    try:
        by_the_reference(bytes(whole))
    except SafetensorError as error:  # pragma: no cover
        pytest.fail(f"the reference reader refuses what ours takes: {error}")
