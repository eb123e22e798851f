"""What every source can do: say which files an adapter has there, and hand over their bytes.

    source.list_files()       names, sizes, where it came from, before a byte is downloaded
    source.read(file)   the bytes, in pieces

Both block, and run in a thread of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from adapters_store.record import Source
from adapters_store.staging import CONFIG_FILE, HUB_WEIGHTS_FILE, WEIGHTS_FILE, is_allowed, refuse_other_weights
from server.library.errors import SourceNotFound

CHUNK_BYTES = 1 << 20
STALL_S = 15.0  # nothing arrives for so long: given up


@dataclass(frozen=True, slots=True)
class SourceFile:
    name: str  # inside the adapter
    key: str  # as the source calls it
    size: int | None = None  # bytes; None when the source does not say
    sha256: str | None = None  # 64 hex digits, where the source knows them


@dataclass(frozen=True, slots=True)
class Listing:
    files: tuple[SourceFile, ...]
    source: Source  # what is recorded with the version
    archive: SourceFile | None = None  # instead of files: a tar, gzipped tar or zip that holds them


class AdapterSource(Protocol):
    """One place that holds one adapter."""

    def list_files(self) -> Listing:
        """Raises SourceError."""
        ...

    def read(self, file: SourceFile) -> Iterator[bytes]:
        """Raises SourceError; the bytes are those of the file that was listed."""
        ...


def choose_files(files: Iterable[SourceFile], where: str) -> tuple[SourceFile, ...]:
    """The files that are an adapter's, sorted by name; whatever else lies there is left alone.

    Raises:
        SourceNotFound: there is no adapter at `where`.
        FileRefused: its weights are a pickle, or must be converted first.
    """
    found = {file.name: file for file in files}
    if CONFIG_FILE not in found:
        raise SourceNotFound(f"{where} holds no {CONFIG_FILE}, so it is no adapter.")
    refuse_other_weights(found)
    if not {WEIGHTS_FILE, HUB_WEIGHTS_FILE} & found.keys():
        raise SourceNotFound(f"{where} holds no {WEIGHTS_FILE}.")
    return tuple(found[name] for name in sorted(found) if is_allowed(name))
