"""Archives that climb, link, lie, burst or hide something."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tests.adapters_store.hostile.hostile_member import HostileMember, archive
from tests.adapters_store.hostile.packing import (
    TarEntry,
    ZipEntry,
    config,
    pax,
    sound,
    sound_tar,
    sound_zip,
    tar,
    weights,
    zip_of,
    zipped,
)

UNSAFE, BROKEN, REFUSED, LARGE = "unsafe_archive", "malformed_archive", "file_refused", "too_large"
_MIB = 2**20


def archives() -> Iterator[HostileMember]:
    yield from _tar_paths()
    yield from _tar_kinds()
    yield from _tar_lies()
    yield from _tar_contents()
    yield from _gzips()
    yield from _zips()


def _tar_paths() -> Iterator[HostileMember]:
    paths: dict[str, bytes | str] = {
        "climbs": "../adapter_config.json",
        "climbs-from-inside": "sql/../../../adapter_config.json",
        "absolute": "/var/adapter_config.json",
        "backslash": "..\\adapter_config.json",
        "drive": "C:/adapter_config.json",
        "empty-part": "sql//adapter_config.json",
        "newline": "sql\n/adapter_config.json",
        "not-utf8": b"sql\xff/adapter_config.json",
        "right-to-left": "nosj.gifnoc_retpada\u202e",
        "empty": "",
        "only-dots": "./.",
        "deep": "a/" * 20 + "adapter_config.json",
    }
    for name, path in paths.items():
        yield archive(f"tar-path-{name}", UNSAFE, sound_tar(TarEntry(path, b"{}")))
    yield archive("tar-path-long", UNSAFE, sound_tar(TarEntry("long", b"a" * 2000, b"L"), TarEntry("x", b"{}")))
    yield archive("tar-path-climbs-by-pax", UNSAFE, sound_tar(pax(path="../../etc/cron.d/x"), TarEntry("README.md")))
    yield archive("tar-folder-climbs", UNSAFE, sound_tar(TarEntry("../out/", kind=b"5")))


def _tar_kinds() -> Iterator[HostileMember]:
    kinds = {"hard-link": b"1", "symbolic-link": b"2", "character-device": b"3", "block-device": b"4", "pipe": b"6",
             "sparse": b"S", "volume": b"V", "unknown-type": b"Z"}  # fmt: skip
    for name, kind in kinds.items():
        entry = TarEntry("README.md", kind=kind, link=b"/etc/passwd")
        yield archive(f"tar-{name}", UNSAFE, sound_tar(entry))
    linked = TarEntry("sql", kind=b"2", link=b"/var")
    yield archive("tar-folder-is-a-link", UNSAFE, sound_tar(linked, folder="sql/"))
    yield archive("tar-weights-are-a-link", UNSAFE, tar(TarEntry("adapter_config.json", config()),
                  TarEntry("adapter_model.safetensors", kind=b"2", link=b"/etc/shadow")))  # fmt: skip
    yield archive("tar-long-link", UNSAFE, sound_tar(TarEntry("long", b"b" * 200, b"K"), TarEntry("x", b"{}")))
    sparse = pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="99999999999")
    yield archive("tar-pax-sparse", UNSAFE, sound_tar(sparse, TarEntry("README.md", b"0\n")))
    yield archive("tar-pax-charset", UNSAFE, sound_tar(pax(hdrcharset="BINARY"), TarEntry("README.md")))


def _tar_lies() -> Iterator[HostileMember]:
    readme = TarEntry("README.md", b"x")
    yield archive("tar-size-behind-the-end", BROKEN, tar(TarEntry("README.md", b"x", size=b"00000040000\0")), 400)
    huge = b"\x80" + bytes(3) + struct.pack(">Q", 2**62)
    yield archive("tar-size-of-exabytes", LARGE, sound_tar(TarEntry("README.md", b"x", size=huge)), 413)
    yield archive("tar-size-negative", BROKEN, sound_tar(TarEntry("README.md", b"x", size=b"\xff" * 12)), 400)
    yield archive("tar-size-no-number", BROKEN, sound_tar(TarEntry("README.md", b"x", size=b"0x12345678 \0")), 400)
    yield archive("tar-pax-size", LARGE, sound_tar(pax(size="9999999999"), readme), 413)
    yield archive("tar-pax-size-no-number", BROKEN, sound_tar(pax(size="-1"), readme), 400)
    yield archive("tar-checksum", BROKEN, sound_tar(TarEntry("README.md", b"x", checksum=1)), 400)
    yield archive("tar-without-end", BROKEN, tar(*_entries(), end=b""), 400)
    yield archive("tar-half-an-end", BROKEN, tar(*_entries(), end=bytes(512)), 400)
    yield archive("tar-cut-in-a-file", BROKEN, sound_tar()[:1700], 400)
    yield archive("tar-second-archive-behind", BROKEN, sound_tar() + sound_tar(), 400)
    yield archive("tar-hole-in-the-middle", BROKEN, tar(readme, end=bytes(512)) + sound_tar(), 400)
    big_pax = TarEntry("pax", b"", b"x", size=b"07777777777\0")
    yield archive("tar-pax-of-a-gigabyte", UNSAFE, sound_tar(big_pax))
    yield archive("tar-pax-damaged", BROKEN, sound_tar(TarEntry("pax", b"99 path=x\n", b"x"), readme), 400)
    yield archive("tar-pax-at-the-end", BROKEN, tar(*_entries(), pax(path="README.md")), 400)
    yield archive("tar-pax-for-all", UNSAFE, sound_tar(pax(b"g", path="README.md")))
    yield archive("tar-pax-upon-pax", UNSAFE, sound_tar(*[pax(comment="x")] * 20, readme))
    yield archive("tar-folder-with-data", BROKEN, sound_tar(TarEntry("sql/", b"x", b"5")), 400)


def _tar_contents() -> Iterator[HostileMember]:
    yield archive("tar-empty", BROKEN, tar(), 400)
    yield archive("tar-without-files", "missing_file", tar(TarEntry("sql/", kind=b"5")))
    yield archive("tar-file-twice", REFUSED, sound_tar(TarEntry("adapter_config.json", b"{}")))
    yield archive("tar-two-adapters", REFUSED, sound_tar(TarEntry("other/README.md", b"x"), folder="sql/"))
    yield archive("tar-many-folders", UNSAFE, zipped(sound_tar(*[TarEntry(f"{n}/", kind=b"5") for n in range(300)])))
    names = {"pickle": "adapter_model.bin", "optimizer": "optimizer.pt", "script": "setup.py", "hidden": ".bashrc",
             "other-case": "Adapter_Config.json", "look-alike": "adapter_c\u043enfig.json", "archive": "more.tar.gz",
             "full-width": "\uff21dapter_config.json"}  # fmt: skip
    for name, path in names.items():
        yield archive(f"tar-holds-{name}", REFUSED, sound_tar(TarEntry(path, b"\x80\x04cos\nsystem\n.")))
    code = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R."
    pickled = tar(TarEntry("adapter_config.json", config()), TarEntry("adapter_model.safetensors", code))
    yield archive("tar-pickle-named-safetensors", "invalid_safetensors", pickled)


def _gzips() -> Iterator[HostileMember]:
    good = sound_tar()
    zeros = TarEntry("adapter_model.safetensors", bytes(8 * _MIB))
    yield archive("gzip-bomb-file", LARGE, zipped(tar(zeros)), 413)
    silent = TarEntry("tokenizer.model", bytes(6 * _MIB), size=b"%011o\0" % 100)
    yield archive("gzip-bomb-in-a-hole", LARGE, zipped(tar(silent)), 413)
    yield archive("gzip-bomb-behind-the-end", LARGE, zipped(good + bytes(8 * _MIB)), 413)
    yield archive("gzip-bomb-passed-over", LARGE, zipped(sound_tar(TarEntry("._x", bytes(8 * _MIB)))), 413)
    yield archive("gzip-cut", BROKEN, zipped(good)[:-9], 400)
    yield archive("gzip-wrong-sum", BROKEN, zipped(good, checksum=1), 400)
    yield archive("gzip-with-a-tail", BROKEN, zipped(good) + b"tail", 400)
    yield archive("gzip-damaged", BROKEN, zipped(good)[:40] + b"\xff" * 20 + zipped(good)[60:], 400)
    yield archive("gzip-of-text", BROKEN, zipped(b"#!/bin/sh\nid\n" * 60), 400)
    yield archive("gzip-of-gzip", BROKEN, zipped(zipped(good)), 400)
    yield archive("gzip-of-many-parts", BROKEN, zipped(b"") * 5000, 400)
    yield archive("no-archive", BROKEN, b"Rar!\x1a\x07\x00" + bytes(600), 400)
    yield archive("nothing", BROKEN, b"", 400)


def _zips() -> Iterator[HostileMember]:
    readme = ZipEntry("README.md", b"x")
    yield archive("zip-climbs", UNSAFE, sound_zip(ZipEntry("../../README.md", b"x")))
    yield archive("zip-absolute", UNSAFE, sound_zip(ZipEntry("/var/README.md", b"x")))
    yield archive("zip-backslash", UNSAFE, sound_zip(ZipEntry("..\\README.md", b"x")))
    yield archive("zip-only-dots", UNSAFE, sound_zip(ZipEntry(".", b"x")))
    yield archive("zip-file-ends-in-a-dot", UNSAFE, sound_zip(ZipEntry("README.md/.", b"x")))
    yield archive("zip-null-in-a-name", UNSAFE, sound_zip(ZipEntry(b"README.md\0.png", b"x")))
    yield archive("zip-not-utf8", BROKEN, sound_zip(ZipEntry(b"\xff\xfe.md", b"x")), 400)
    yield archive("zip-link", UNSAFE, sound_zip(ZipEntry("README.md", b"/etc/passwd", mode=0o120777)))
    yield archive("zip-device", UNSAFE, sound_zip(ZipEntry("README.md", b"", mode=0o020666)))
    yield archive("zip-encrypted", UNSAFE, sound_zip(ZipEntry("README.md", b"x" * 20, flags=0x801)))
    yield archive("zip-other-method", UNSAFE, sound_zip(ZipEntry("README.md", b"x", method=14)))
    yield archive("zip-bomb", LARGE, zip_of(ZipEntry("adapter_model.safetensors", bytes(8 * _MIB))), 413)
    small = ZipEntry("adapter_model.safetensors", bytes(8 * _MIB), size=64)
    yield archive("zip-bomb-said-to-be-small", BROKEN, zip_of(small), 400)
    yield archive("zip-larger-than-it-is", BROKEN, sound_zip(ZipEntry("README.md", b"x", size=999)), 400)
    yield archive("zip-wrong-sum", BROKEN, sound_zip(ZipEntry("README.md", b"x", crc=1)), 400)
    yield archive("zip-cut", BROKEN, sound_zip()[:-30], 400)
    shared = [ZipEntry(name, data, offset=0) for name, data in sound().items()]
    yield archive("zip-shared-bytes", UNSAFE, zip_of(ZipEntry("adapter_config.json", config()), *shared))
    yield archive("zip-two-names", BROKEN, sound_zip(ZipEntry("README.md", b"x", local_name=b"../../xx1")), 400)
    second = struct.pack("<HHBI", 0x7075, 5 + 4, 1, 0) + b"x.sh"
    yield archive("zip-unicode-name", UNSAFE, sound_zip(ZipEntry("README.md", b"x", extra=second)))
    yield archive("zip-inside-another", UNSAFE, zip_of(readme) + sound_zip())
    yield archive("zip-many", UNSAFE, sound_zip(*[ZipEntry(f"{n}/", mode=0o040755) for n in range(300)]))
    yield archive("zip-wrong-count", BROKEN, zip_of(readme, count=40), 400)
    yield archive("zip-twice", REFUSED, sound_zip(ZipEntry("adapter_config.json", b"{}")))
    yield archive("zip-pickle", REFUSED, sound_zip(ZipEntry("pytorch_model.bin", b"\x80\x04.")))
    yield archive("zip-folder-with-data", BROKEN, sound_zip(ZipEntry("sql/", b"x", mode=0o040755)), 400)
    yield archive("zip-empty", "missing_file", zip_of())


def _entries() -> list[TarEntry]:
    return [TarEntry("adapter_config.json", config()), TarEntry("adapter_model.safetensors", weights())]
