"""An adapter that arrives as one archive: tar, gzipped tar, or zip.

    with catalog.stage() as stage:
        archive = ArchiveSink(stage)             the archive itself, on the disk of the stage
        archive.write(b"...")
        left_out = unpack(archive, stage)        now its files are the stage's, and the archive is gone

What it is, its first bytes say. The archive may have a folder around the adapter's files, and must have nothing else
in it but what an adapter may hold; see `archive_member` for paths, `tar` and `zip` for what a member may be. How much
it unpacks to is bounded by the stage's own caps, counted while it unpacks, whatever it announces.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Literal

from adapters_store.archive_member import CHUNK_BYTES, Member, cut_short
from adapters_store.durable import raise_if_full
from adapters_store.errors import FileRefused, MalformedArchive, TooLarge
from adapters_store.staging import Stage
from adapters_store.tar import Bytes, read_tar
from adapters_store.zip import read_zip

Format = Literal["tar", "gzip", "zip"]

_FILE = "received.archive"  # in a stage; no adapter can hold a file of this name
_MAGICS: tuple[tuple[Format, int, bytes], ...] = (
    ("gzip", 0, b"\x1f\x8b"),
    ("zip", 0, b"PK\x03\x04"),
    ("zip", 0, b"PK\x05\x06"),  # with no member at all
    ("tar", 257, b"ustar"),
)
_HEAD_BYTES = 512
_FRAMING_BYTES = 4 * 1024 * 1024  # headers and padding around the files
_MAX_PARTS = 4096  # that a gzip file may be put together from
_GZIP_WINDOW = 31  # zlib's number for "gzip's frame around it"


class ArchiveSink:
    """Where the bytes of the archive go while they arrive. It goes with its stage at the latest."""

    def __init__(self, stage: Stage, num_bytes: int = 0) -> None:
        """`num_bytes`, where known, is held against what there is room for before the first byte.

        Raises TooLarge, DiskFull, StagingFull.
        """
        self.path = stage.directory / _FILE
        self.num_bytes = 0
        self._stage = stage
        self._num_unchecked_bytes = 0
        self._check_size(num_bytes)
        stage.announce(num_bytes)
        self._file = self.path.open("xb")

    def write(self, chunk: bytes) -> None:
        """Raises TooLarge, DiskFull, StagingFull; the archive is of no use then."""
        self.num_bytes += len(chunk)
        self._check_size(self.num_bytes)
        self._stage.share.add(len(chunk))
        self._num_unchecked_bytes += len(chunk)
        if self._num_unchecked_bytes >= self._stage.SPACE_CHECK_BYTES:
            self._num_unchecked_bytes = 0
            self._stage.require_space(0)
        try:
            self._file.write(chunk)
        except OSError as error:
            raise_if_full(error)
            raise

    def close(self) -> None:
        """Raises DiskFull. Again is harmless."""
        try:
            self._file.close()
        except OSError as error:
            raise_if_full(error)
            raise

    def discard(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def _check_size(self, num_bytes: int) -> None:
        limit = self._stage.limits.max_total_bytes + _FRAMING_BYTES
        if num_bytes > limit:
            raise TooLarge(f"the archive is larger than the limit of {limit} bytes.")


def unpack(archive: ArchiveSink, stage: Stage) -> list[str]:
    """Moves the files of an archive into the stage it lies in; returns paths left out, which an operating system added.

    Raises:
        UnsafeArchive: it holds links, devices, paths that climb, or other tricks.
        MalformedArchive: it is damaged, cut short, or of no known format.
        FileRefused: it holds something that is no file of an adapter, a name twice, or more than one adapter.
        TooLarge: it unpacks to more than the stage's caps.
        DiskFull: ... or than there is room for.
    """
    archive.close()
    left_out: list[str] = []
    folder: tuple[str, ...] | None = None
    for member in _members(archive, stage.limits.max_total_bytes):
        if member.is_of_the_system:
            left_out.append("/".join(member.parts))
            _pass_over(member, stage.limits.max_total_bytes)
            continue
        *parents, name = member.parts
        with stage.open_file(name, num_bytes=member.num_bytes) as sink:
            for chunk in member.chunks:
                sink.write(chunk)
        if folder not in (None, tuple(parents)):
            raise FileRefused(
                f"{'/'.join(member.parts)[:200]!r} lies in another folder than the files before it. An archive holds "
                "one adapter: its files at the top, or all in one folder."
            )
        folder = tuple(parents)
    archive.discard()
    return left_out


def format_of(archive: ArchiveSink) -> Format:
    """By its first bytes. Raises MalformedArchive."""
    archive.close()
    with archive.path.open("rb") as file:
        return _format(file.read(_HEAD_BYTES))


def _format(head: bytes) -> Format:
    for name, offset, magic in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    raise MalformedArchive("this is neither a tar archive nor a gzipped one nor a zip archive.")


def _members(archive: ArchiveSink, max_bytes: int) -> Iterator[Member]:
    kind = format_of(archive)
    if kind == "zip":
        yield from read_zip(archive.path)
        return
    with archive.path.open("rb") as file:
        yield from read_tar(_Inflated(file, max_bytes + _FRAMING_BYTES) if kind == "gzip" else file)


def _pass_over(member: Member, max_bytes: int) -> None:
    num_bytes = 0
    for chunk in member.chunks:
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise TooLarge(f"{member.parts[-1][:100]!r} unpacks to more than {max_bytes} bytes.")


class _Inflated:
    """What a gzip file holds, member after member as gzip reads them, never more than asked for at once."""

    def __init__(self, file: Bytes, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_members = 0
        self._waiting = b""  # compressed bytes that have been read and not been used
        self._inflater = zlib.decompressobj(_GZIP_WINDOW)

    def read(self, num_bytes: int) -> bytes:
        """Raises MalformedArchive, TooLarge."""
        while True:
            piece = self._inflate(num_bytes)
            self._num_bytes += len(piece)
            if self._num_bytes > self._max_bytes:
                raise TooLarge(f"the archive unpacks to more than {self._max_bytes} bytes.")
            if piece or not self._go_on():
                return piece

    def _inflate(self, num_bytes: int) -> bytes:
        """What the bytes at hand become; nothing once the member has ended."""
        inflater = self._inflater
        if inflater.eof:  # it would take what follows as unused once more
            return b""
        try:
            return inflater.decompress(self._waiting, num_bytes)
        except zlib.error as error:
            raise MalformedArchive(f"the gzip archive is damaged: {error}") from None
        finally:
            self._waiting = inflater.unconsumed_tail

    def _go_on(self) -> bool:
        """After nothing came out: more of the file, or the next member. False at the end."""
        if not self._inflater.eof:
            self._waiting = self._waiting or self._file.read(CHUNK_BYTES)
            if not self._waiting:
                raise cut_short("its compressed data")
            return True
        self._waiting = (self._inflater.unused_data or self._file.read(CHUNK_BYTES)).lstrip(b"\0")
        while not self._waiting:  # gzip fills the last block of a tape with zeros
            chunk = self._file.read(CHUNK_BYTES)
            if not chunk:
                return False
            self._waiting = chunk.lstrip(b"\0")
        self._num_members += 1
        if self._num_members > _MAX_PARTS:
            raise MalformedArchive(f"the gzip archive consists of more than {_MAX_PARTS} parts.")
        self._inflater = zlib.decompressobj(_GZIP_WINDOW)
        return True
