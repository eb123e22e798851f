"""Small adapters as bytes, and how to commit one. No torch here."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

from adapters_store.catalog import Catalog, Committed
from adapters_store.record import Content, Source

BASE = "sha256:base-one"
CONFIG = b'{"peft_type": "LORA", "r": 2}'


def safetensors_bytes(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    """A well-formed file: name -> (dtype, shape, data)."""
    header: dict[str, object] = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def weights(fill: int = 0) -> bytes:
    return safetensors_bytes({"a": ("F32", [2, 3], bytes([fill]) * 24), "b": ("BF16", [4], bytes([fill]) * 8)})


def content(tag: str = "one", base: str = BASE) -> Content:
    return Content(effect_digest=f"sha256:{tag.encode().hex():0>64}", base_fingerprint=base, report={"rank": 2})


def commit(catalog: Catalog, name: str, fill: int = 0, **options: object) -> Committed:
    """Uploads and commits a small adapter whose bytes depend on `fill` alone."""
    with catalog.stage() as stage:
        stage.add_file("adapter_config.json", [CONFIG])
        stage.add_file("adapter_model.safetensors", [weights(fill)])
        return catalog.commit(
            stage,
            name,
            content(f"effect-{fill}", catalog.base_fingerprint),
            Source("upload:"),
            **options,  # type: ignore[arg-type]
        )
