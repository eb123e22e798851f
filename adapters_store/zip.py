"""Reads a zip archive that lies on the disk, on top of the standard library and with less trust.

Refused beyond what `zipfile` refuses: links and devices, encryption, members that share bytes with others (the trick
of the archives that unpack to petabytes), two directories of the same archive, and a directory too large to be one.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from adapters_store.archive_member import CHUNK_BYTES, Member, count_member, cut_short, parts_of, parts_of_file
from adapters_store.errors import MalformedArchive, UnsafeArchive

_MAX_READ_BYTES = 1024 * 1024  # the directory of 256 members takes kilobytes
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_UNICODE_PATH = 0x7075  # an extra field by which other programs see another name
_LOCAL_HEADER_BYTES = 30
_END_BYTES, _END_SIGNATURE = 22, b"PK\x05\x06"
_DAMAGE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    EOFError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
    zlib.error,
)


class _ModestFile:
    """An open file that is never read or moved as an archive's own numbers say, unless they make sense."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def read(self, num_bytes: int = -1) -> bytes:
        found = self._file.read(_MAX_READ_BYTES + 1 if num_bytes < 0 else min(num_bytes, _MAX_READ_BYTES + 1))
        if len(found) > _MAX_READ_BYTES:
            raise UnsafeArchive(f"the archive's directory is larger than {_MAX_READ_BYTES} bytes.")
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and not 0 <= offset < 2**62:
            raise MalformedArchive("the archive's directory points outside of it: it is damaged.")
        return self._file.seek(offset, whence)  # OSError, where from the end: how zipfile finds out what there is

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()


def read_zip(path: Path) -> Iterator[Member]:
    """Its plain files, one after the other.

    Raises:
        UnsafeArchive: a member is neither a plain file nor a folder, its path climbs, or it shares bytes with others.
        MalformedArchive: it is damaged, cut short, or no zip archive.
        OSError: it cannot be read.
    """
    file = _ModestFile(path)
    try:
        archive = zipfile.ZipFile(file)
        found = archive.infolist()
        count_member(len(found))
        _check_count(file, archive)
        _check_places(found, archive.start_dir)
        for entry in found:
            if _is_folder(entry):
                parts_of(entry.orig_filename)
            else:
                yield Member(parts_of_file(entry.orig_filename), entry.file_size, _data(archive, entry))
    except _DAMAGE as error:
        raise MalformedArchive(f"the zip archive is damaged: {str(error)[:200]}") from error
    finally:
        file.close()


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    """False for a plain file. Raises UnsafeArchive for anything else."""
    name = entry.orig_filename
    if entry.flag_bits & _ENCRYPTED:
        raise UnsafeArchive(f"{name[:200]!r} is encrypted.")
    if entry.compress_type not in _METHODS:
        raise UnsafeArchive(f"{name[:200]!r} is compressed by method {entry.compress_type}; only deflate is read.")
    if _has_field(entry.extra, _UNICODE_PATH):
        raise UnsafeArchive(f"{name[:200]!r} has a second name. Pack it without that.")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    is_folder = name.endswith("/")
    if kind not in (0, stat.S_IFDIR if is_folder else stat.S_IFREG):
        raise UnsafeArchive(f"{name[:200]!r} is a link, a device or the like; an adapter consists of plain files.")
    if is_folder and entry.file_size:
        raise MalformedArchive(f"the folder {name[:200]!r} announces {entry.file_size} bytes of its own.")
    return is_folder


def _check_places(entries: list[zipfile.ZipInfo], directory: int) -> None:
    """Raises UnsafeArchive where members overlap each other or the directory, or something stands before them."""
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    if ordered and ordered[0].header_offset != 0:
        raise UnsafeArchive("something stands before the first member of the zip archive.")
    ends = [entry.header_offset for entry in ordered[1:]] + [directory]
    for entry, end in zip(ordered, ends, strict=False):
        if entry.header_offset + _LOCAL_HEADER_BYTES + entry.compress_size > end:
            raise UnsafeArchive(f"{entry.orig_filename[:200]!r} shares its bytes with another part of the archive.")


def _check_count(file: _ModestFile, archive: zipfile.ZipFile) -> None:
    """Raises MalformedArchive where the end of the archive counts other members than its directory lists."""
    file.seek(-_END_BYTES - len(archive.comment), 2)
    signature, _, _, _, count = struct.unpack_from("<4sHHHH", file.read(_END_BYTES))
    if signature != _END_SIGNATURE or count != len(archive.infolist()):
        raise MalformedArchive("the end of the zip archive does not fit its directory: it is damaged.")


def _data(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    num_bytes = 0
    try:
        with archive.open(entry) as file:
            while piece := file.read(CHUNK_BYTES):
                num_bytes += len(piece)
                yield piece
    except _DAMAGE as error:
        raise MalformedArchive(f"{entry.orig_filename[:200]!r} in the zip archive is damaged: {error}") from error
    if num_bytes != entry.file_size:
        raise cut_short(repr(entry.orig_filename[:200]))


def _has_field(extra: bytes, wanted: int) -> bool:
    position = 0
    while position + 4 <= len(extra):
        kind, num_bytes = struct.unpack_from("<HH", extra, position)
        if kind == wanted:
            return True
        position += 4 + num_bytes
    return False
