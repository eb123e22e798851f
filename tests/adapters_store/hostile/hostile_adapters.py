"""Weights and configs that lie, arrive as plain multipart bodies."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

from tests.adapters_store.hostile.hostile_member import HostileMember, upload
from tests.adapters_store.hostile.packing import (
    A_NAME,
    WIDTH,
    config,
    data_of,
    form,
    form_with,
    framed,
    header_of,
    lying_weights,
    sound,
    tensors,
    weights,
)

BAD_HEADER, BAD_CONFIG = "invalid_safetensors", "malformed_adapter"


def adapters() -> Iterator[HostileMember]:
    for name, header in _headers().items():
        yield upload(f"header-{name}", BAD_HEADER, form_with(weights=header))
    yield from _tensors()
    yield from _configs()


def _headers() -> dict[str, bytes]:
    given = tensors()
    header, data = header_of(given), data_of(given)
    text = json.dumps(header).encode()
    size = 4 * WIDTH
    return {
        "empty-file": b"",
        "seven-bytes": b"\x01" * 7,
        "length-of-exabytes": framed(text, data, 2**63),
        "length-over-its-cap": framed(text, data, 9 * 2**20),
        "length-behind-the-end": framed(text, data, 60_000),
        "length-zero": framed(b"", data),
        "pickle": b"\x80\x04\x95" + b"cos\nsystem\n(S'id'\ntR." * 4,
        "cut-short": weights()[:-1],
        "one-byte-too-many": weights() + b"\0",
        "not-json": framed(b"{" + b"x" * 100, data),
        "not-utf8": framed(b'{"\xff": 1}', data),
        "an-array": framed(b"[" * 50 + b"]" * 50, data),
        "deeply-nested": framed(b'{"a":' * 5000 + b"1" + b"}" * 5000, data),
        "nan": framed(text.replace(b"[0,", b"[NaN,", 1), data),
        "metadata-of-numbers": framed(json.dumps(header | {"__metadata__": {"a": 1}}).encode(), data),
        "name-twice": framed(text[:-1] + b", " + text[1:], data),
        "name-empty": framed(json.dumps(header | {"": header[A_NAME]}).encode(), data),
        "name-with-control-characters": framed(json.dumps({"a\x1b[2J": header[A_NAME]}).encode(), data[:size]),
        "name-too-long": framed(json.dumps({"a" * 600: header[A_NAME]}).encode(), data[:size]),
        "field-unknown": lying_weights(codec="zstd"),
        "dtype-unknown": lying_weights(dtype="F4"),
        "dtype-of-other-size": lying_weights(dtype="F64"),
        "shape-of-other-size": lying_weights(shape=[2, WIDTH]),
        "shape-negative": lying_weights(shape=[-1, -WIDTH]),
        "shape-that-overflows": lying_weights(shape=[2**32, 2**32, WIDTH]),
        "shape-of-fractions": lying_weights(shape=[1.0, WIDTH]),
        "shape-of-truth": lying_weights(shape=[True, WIDTH]),
        "shape-of-many-sizes": lying_weights(shape=[1] * 40 + [WIDTH]),
        "offsets-overlap": lying_weights(data_offsets=[size, 2 * size]),
        "offsets-leave-a-hole": lying_weights(data_offsets=[0, size - 1]),
        "offsets-backwards": lying_weights(data_offsets=[size, 0]),
        "offsets-behind-the-end": lying_weights(data_offsets=[2**40, 2**40 + size]),
        "offsets-of-absurd-length": framed(text.replace(b"[0,", b"[" + b"9" * 6000 + b",", 1), data),
    }


def _tensors() -> Iterator[HostileMember]:
    row = tensors()[A_NAME][2]

    def with_values(*first: float) -> bytes:
        data = struct.pack(f"<{len(first)}f", *first) + row[4 * len(first) :]
        return form_with(weights=weights({A_NAME: ("F32", [1, WIDTH], data)}))

    yield upload("tensor-nan", "malformed_adapter", with_values(float("nan")))
    yield upload("tensor-infinite", "malformed_adapter", with_values(float("inf")))
    yield upload("tensor-minus-infinite", "malformed_adapter", with_values(0.0, float("-inf")))
    integers = {A_NAME: ("I32", [1, WIDTH], row)}
    yield upload("tensor-of-integers", "malformed_adapter", form_with(weights=weights(integers)))
    truths = {A_NAME: ("BOOL", [1, 4 * WIDTH], row)}
    yield upload("tensor-of-truth", "malformed_adapter", form_with(weights=weights(truths)))
    turned = {A_NAME: ("F32", [WIDTH, 1], row)}
    yield upload("tensor-transposed", "base_mismatch", form_with(weights=weights(turned)))
    short = tensors()
    del short[A_NAME]
    cut = framed(json.dumps(header_of(short)).encode(), data_of(short))
    yield upload("tensor-missing", "malformed_adapter", form_with(weights=cut))
    more = weights({"base_model.model.model.embed_tokens.weight": ("F32", [1, WIDTH], row)})
    yield upload("tensor-nobody-asked-for", "base_mismatch", form_with(weights=more))
    nothing = framed(b"{}", b"")
    yield upload("tensor-none", "malformed_adapter", form_with(weights=nothing))


def _configs() -> Iterator[HostileMember]:
    text = config()
    broken = {
        "not-json": b"{" * 20,
        "nan": text.replace(b'"r": 1', b'"r": NaN'),
        "field-twice": text.replace(b'"r": 1', b'"r": 1, "r": 64'),
        "an-array": b"[1, 2]",
        "deeply-nested": b"[" * 10_000,
        "pickle": b"\x80\x04cos\nsystem\n.",
        "rank-of-text": config(r="1"),
        "rank-negative": config(r=-1),
    }
    for name, body in broken.items():
        yield upload(f"config-{name}", BAD_CONFIG, form_with(config=body))
    yield upload("config-too-large", "too_large", form_with(config=text + b" " * 20_000), 413)
    yield upload("config-rank-of-a-billion", "malformed_adapter", form_with(config=config(r=10**9)))
    yield upload("config-kind-unknown", "unsupported_peft_type", form_with(config=config(peft_type="SHELL")))
    yield upload("config-field-unknown", "unsupported_adapter", form_with(config=config(lora_exec="id")))
    yield upload("config-alone", "missing_file", form({"adapter_config.json": text}))
    yield upload("weights-alone", "missing_file", form({"adapter_model.safetensors": weights()}))
    both = {**sound(), "adapter.safetensors": weights()}
    yield upload("weights-of-two-kinds", "ambiguous_files", form(both))
    nothing = form_with(config=config(target_modules="(a+)+$" + "x" * 40))
    yield upload("config-slow-pattern", "base_mismatch", nothing)
