"""Bodies of uploads built byte by byte, sound or broken in one place. Standard library only; the same bytes always."""

from __future__ import annotations

import binascii
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MODULES = ("q_proj", "v_proj")
WIDTH = 16
BOUNDARY = "corpus"


def config(**fields: Any) -> bytes:
    """adapter_config.json of a LoRA of rank 1 on the base of `tests.library.library_samples`."""
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 1,
        "lora_alpha": 2,
        "target_modules": list(MODULES),
    }
    return json.dumps({**told, **fields}).encode()


def tensors() -> dict[str, tuple[str, list[int], bytes]]:
    found: dict[str, tuple[str, list[int], bytes]] = {}
    row = struct.pack(f"<{WIDTH}f", *[0.25 * (place % 5 - 2) for place in range(WIDTH)])
    for layer in range(2):
        for module in MODULES:
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            found[f"{stem}.lora_A.weight"] = ("F32", [1, WIDTH], row)
            found[f"{stem}.lora_B.weight"] = ("F32", [WIDTH, 1], row)
    return found


A_NAME = next(iter(tensors()))


def header_of(given: Mapping[str, tuple[str, list[int], bytes]]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    place = 0
    for name, (dtype, shape, data) in given.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    return header


def data_of(given: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    return b"".join(data for _, _, data in given.values())


def framed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file around a header as text; `length` is a lie about it."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def weights(changed: Mapping[str, tuple[str, list[int], bytes]] | None = None) -> bytes:
    """adapter_model.safetensors, with some tensors put in place of its own."""
    given = tensors() | dict(changed or {})
    return framed(json.dumps(header_of(given)).encode(), data_of(given))


def lying_weights(**entry: Any) -> bytes:
    """The first tensor's entry in the header says something else."""
    given = tensors()
    header = header_of(given)
    header[A_NAME] |= entry
    return framed(json.dumps(header).encode(), data_of(given))


def sound() -> dict[str, bytes]:
    return {"adapter_config.json": config(), "adapter_model.safetensors": weights()}


# ---------------------------------------------------------------------------- tar


@dataclass(frozen=True)
class TarEntry:
    """One member; every field can be a lie."""

    name: bytes | str
    data: bytes = b""
    kind: bytes = b"0"
    link: bytes = b""
    size: bytes | None = None  # the field as it stands there
    checksum: int | None = None

    def __bytes__(self) -> bytes:
        name = self.name.encode() if isinstance(self.name, str) else self.name
        size = b"%011o\0" % len(self.data) if self.size is None else self.size
        before = name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0"
        after = self.kind + self.link.ljust(100, b"\0") + b"ustar\x0000"
        after = after.ljust(512 - len(before) - 8, b"\0")
        total = sum(before) + 8 * 32 + sum(after) if self.checksum is None else self.checksum
        return before + b"%06o\0 " % total + after + self.data + bytes(-len(self.data) % 512)


def pax(kind: bytes = b"x", **records: str) -> TarEntry:
    return TarEntry("pax", b"".join(_record(key, value) for key, value in records.items()), kind)


def _record(key: str, value: str) -> bytes:
    body = f" {key.replace('__', '.')}={value}\n".encode()
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def tar(*entries: TarEntry, end: bytes = bytes(1024)) -> bytes:
    return b"".join(bytes(entry) for entry in entries) + end


def sound_tar(*more: TarEntry, folder: str = "", **changed: bytes) -> bytes:
    """The sound adapter, `more` before it."""
    return tar(*more, *(TarEntry(folder + name, data) for name, data in sound().items()))


def zipped(data: bytes, checksum: int | None = None) -> bytes:
    """gzip's frame around deflated data, without a time."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflater.compress(data) + deflater.flush()
    crc = binascii.crc32(data) if checksum is None else checksum
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + body + struct.pack("<II", crc, len(data) & 0xFFFFFFFF)


# ---------------------------------------------------------------------------- zip


@dataclass(frozen=True)
class ZipEntry:
    """One member; every field can be a lie."""

    name: bytes | str
    data: bytes = b""
    mode: int = 0o100644
    flags: int = 0x800  # names are UTF-8
    method: int = 8
    size: int | None = None  # as announced
    crc: int | None = None
    local_name: bytes | None = None
    extra: bytes = b""
    offset: int | None = None  # of a local header that stands elsewhere

    @property
    def raw_name(self) -> bytes:
        return self.name.encode() if isinstance(self.name, str) else self.name

    @property
    def packed(self) -> bytes:
        if self.method == 0:
            return self.data
        deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
        return deflater.compress(self.data) + deflater.flush()

    def facts(self) -> bytes:
        """What stands in the local header and in the directory alike."""
        crc = binascii.crc32(self.data) if self.crc is None else self.crc
        size = len(self.data) if self.size is None else self.size
        return struct.pack("<HHHHIII", self.flags, self.method, 0, 0x21, crc, len(self.packed), size)

    def local(self) -> bytes:
        name = self.raw_name if self.local_name is None else self.local_name
        lengths = struct.pack("<HH", len(name), len(self.extra))
        return b"PK\x03\x04\x14\0" + self.facts() + lengths + name + self.extra + self.packed

    def listed(self, offset: int) -> bytes:
        lengths = struct.pack("<HHHHH", len(self.raw_name), len(self.extra), 0, 0, 0)
        place = struct.pack("<II", self.mode << 16, offset if self.offset is None else self.offset)
        return b"PK\x01\x02\x14\x03\x14\0" + self.facts() + lengths + place + self.raw_name + self.extra


def zip_of(*entries: ZipEntry, count: int | None = None) -> bytes:
    body, listing = b"", b""
    for entry in entries:
        listing += entry.listed(len(body))
        body += entry.local() if entry.offset is None else b""
    number = len(entries) if count is None else count
    return body + listing + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, number, number, len(listing), len(body), 0)


def sound_zip(*more: ZipEntry) -> bytes:
    return zip_of(*more, *(ZipEntry(name, data) for name, data in sound().items()))


# ---------------------------------------------------------------------- multipart


def part(disposition: str, body: bytes) -> bytes:
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + body + b"\r\n"


def form(files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], metadata: bytes | None = None) -> bytes:
    """A complete multipart body: the metadata, then the files."""
    given = files.items() if isinstance(files, Mapping) else files
    told = b'{"name": "victim"}' if metadata is None else metadata
    parts = [part('name="metadata"', told), *(part(f'name="files"; filename="{name}"', data) for name, data in given)]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def form_with(**changed: bytes) -> bytes:
    """The sound adapter with other bytes: `config=`, `weights=`."""
    return form({"adapter_config.json": changed.get("config", config()),
                 "adapter_model.safetensors": changed.get("weights", weights())})  # fmt: skip
