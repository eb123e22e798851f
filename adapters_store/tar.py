"""Reads a tar archive from beginning to end, strictly: whatever is not a plain file or a folder is refused.

    archive = (header (512 bytes) + data, padded to 512)* + two blocks of zeros + zeros

Understood are POSIX (ustar, pax) and GNU archives as tar, bsdtar and Python write them. Where the standard library's
reader is lenient, this one is not: a damaged header is no end of the archive, a sparse file no file, and what stands
behind the end is refused. Memory is bounded by one chunk, whatever an archive announces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from adapters_store.archive_member import CHUNK_BYTES, Member, count_member, cut_short, parts_of, parts_of_file
from adapters_store.errors import MalformedArchive, UnsafeArchive

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_EXTENSION_BYTES = 64 * 1024  # a pax header or a GNU long name
_MAX_EXTENSIONS = 8  # in a row, for one member
_SIZE_DIGITS = re.compile(rb"[0-7]{0,11}", re.ASCII)
_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ", re.ASCII)
_FILES, _FOLDER = (b"0", b"\0"), b"5"
_PAX, _GLOBAL_PAX, _LONG_NAME = b"x", b"g", b"L"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"7": "a contiguous file",
    b"K": "a link",
    b"S": "a sparse file",
    b"M": "a part of a file",
    b"V": "a volume's label",
    b"D": "a dump of a folder",
}
_REFUSED_RECORDS = (b"GNU.sparse.", b"hdrcharset", b"SCHILY.realsize")  # the data would not be the file


class Bytes(Protocol):
    """Where the archive's bytes come from."""

    def read(self, num_bytes: int) -> bytes:
        """Up to `num_bytes`; nothing at the end only."""
        ...


class _Reader:
    """Whole blocks of a source."""

    def __init__(self, source: Bytes) -> None:
        self._source = source

    def exactly(self, num_bytes: int, what: str) -> bytes:
        """Raises MalformedArchive if fewer are left. For small pieces only."""
        found = b""
        while len(found) < num_bytes:
            piece = self._source.read(num_bytes - len(found))
            if not piece:
                raise cut_short(what)
            found += piece
        return found

    def data(self, num_bytes: int, what: str) -> Iterator[bytes]:
        """The data of one member in pieces, its padding taken too."""
        left = num_bytes
        while left:
            piece = self._source.read(min(left, CHUNK_BYTES))
            if not piece:
                raise cut_short(what)
            left -= len(piece)
            yield piece
        self.exactly(-num_bytes % _BLOCK, what)

    def rest(self) -> Iterator[bytes]:
        while piece := self._source.read(CHUNK_BYTES):
            yield piece


def read_tar(source: Bytes) -> Iterator[Member]:
    """Its plain files, one after the other.

    Raises:
        UnsafeArchive: a member is neither a plain file nor a folder, or its path climbs.
        MalformedArchive: it is damaged, cut short, or no tar archive.
    """
    reader = _Reader(source)
    extensions: dict[bytes, bytes] = {}
    num_members = num_extensions = 0
    while (header := reader.exactly(_BLOCK, "a header or before its end mark")) != _ZEROS:
        _check_sum(header)
        kind = header[156:157]
        if kind in (_PAX, _GLOBAL_PAX, _LONG_NAME):
            num_extensions += 1
            if num_extensions > _MAX_EXTENSIONS:
                raise UnsafeArchive(f"more than {_MAX_EXTENSIONS} extended headers stand before one member.")
            extensions |= _read_extension(reader, kind, _size_of(header))
            continue
        num_members += 1
        count_member(num_members)
        path = extensions.get(b"path", _plain_path(header))
        num_bytes = _announced_size(extensions, header)
        extensions, num_extensions = {}, 0
        if kind == _FOLDER:
            _check_folder(path, num_bytes)
            continue
        yield _plain_file(reader, kind, path, num_bytes)
    if extensions:
        raise MalformedArchive("the archive ends with an extended header that belongs to no member.")
    _check_end(reader)


def _plain_file(reader: _Reader, kind: bytes, path: bytes, num_bytes: int) -> Member:
    if kind not in _FILES:
        what = _KINDS.get(kind, f"of the unknown type {kind!r}")
        raise UnsafeArchive(f"{path[:200]!r} is {what}; an adapter consists of plain files.")
    parts = parts_of_file(path)
    return Member(parts, num_bytes, reader.data(num_bytes, f"{parts[-1]!r}"))


def _check_folder(path: bytes, num_bytes: int) -> None:
    parts_of(path)
    if num_bytes:
        raise MalformedArchive(f"the folder {path[:200]!r} announces {num_bytes} bytes of its own.")


def _check_sum(header: bytes) -> None:
    if header[257:262] != b"ustar":
        raise MalformedArchive("a header of the archive does not say `ustar`: it is damaged, or no tar archive.")
    stored = _number(header[148:156])
    if stored != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise MalformedArchive("a header of the archive has a wrong checksum: it is damaged.")


def _check_end(reader: _Reader) -> None:
    if reader.exactly(_BLOCK, "its end mark") != _ZEROS:
        raise MalformedArchive("a block of zeros stands in the middle of the archive: it is damaged.")
    for piece in reader.rest():
        if piece.count(0) != len(piece):
            raise MalformedArchive("something stands behind the end of the archive.")


def _size_of(header: bytes) -> int:
    """Bytes of data behind a header."""
    field = header[124:136]
    if field[0] == 0x80:  # GNU's way to write more than 8 GiB
        return int.from_bytes(field[1:], "big")
    return _number(field)


def _number(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not _SIZE_DIGITS.fullmatch(digits):
        raise MalformedArchive(f"a header of the archive holds {field!r} where a number belongs.")
    return int(digits or b"0", 8)


def _plain_path(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _announced_size(extensions: dict[bytes, bytes], header: bytes) -> int:
    text = extensions.get(b"size")
    if text is None:
        return _size_of(header)
    if not text.isdigit() or len(text) > 19:
        raise MalformedArchive(f"an extended header announces the size {text[:40]!r}.")
    return int(text)


def _read_extension(reader: _Reader, kind: bytes, num_bytes: int) -> dict[bytes, bytes]:
    """What an extended header says of the next member."""
    if num_bytes > _MAX_EXTENSION_BYTES:
        raise UnsafeArchive(f"an extended header announces {num_bytes} bytes; the limit is {_MAX_EXTENSION_BYTES}.")
    data = b"".join(reader.data(num_bytes, "an extended header"))
    if kind == _LONG_NAME:
        return {b"path": data.removesuffix(b"\0")}
    records = dict(_pax_records(data))
    for key in records:
        if key.startswith(_REFUSED_RECORDS):
            raise UnsafeArchive(f"an extended header sets {key[:40]!r}: an adapter consists of plain files.")
    if kind == _PAX:
        return records
    if records.keys() & {b"path", b"size", b"linkpath"}:
        raise UnsafeArchive("a global extended header sets the path, size or link of every member.")
    return {}


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """`12 key=value\\n`, the number being the length of the whole record."""
    position = 0
    while position < len(data):
        match = _RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        record = data[match.end() : end] if match else b""
        key, equals, value = record.partition(b"=")
        if end > len(data) or not key or not equals or not value.endswith(b"\n"):
            raise MalformedArchive("an extended header of the archive is damaged.")
        yield key, value[:-1]
        position = end
