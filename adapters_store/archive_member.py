"""One file inside an archive, and what its path may be.

An archive holds the plain files of one adapter, at its top or in one folder, however deep. Nothing is ever written to
a path that an archive names: the last part of it, if it is an adapter's file, goes into a stage.

    ./sql/adapter_config.json   ->  ("sql", "adapter_config.json")
    /etc/passwd, ../x, a\\x     ->  UnsafeArchive
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from adapters_store.errors import MalformedArchive, UnsafeArchive

MAX_MEMBERS = 256  # folders included
CHUNK_BYTES = 1 << 18
_MAX_PATH_CHARS = 1024
_MAX_PARTS = 16
_DRIVE = re.compile(r"[A-Za-z]:")
_SYSTEM_FOLDER = "__MACOSX"  # what macOS adds unasked: attributes of its own file system
_SYSTEM_FILES = ("._", ".DS_Store")


class Member(NamedTuple):
    """A plain file. Its chunks must be taken before the next member is asked for."""

    parts: tuple[str, ...]  # of its path
    num_bytes: int  # as the archive announces them; the chunks are so many, or the reader raises
    chunks: Iterator[bytes]

    @property
    def is_of_the_system(self) -> bool:
        """Whether it was added by the packer's operating system and says nothing about the adapter."""
        return self.parts[0] == _SYSTEM_FOLDER or self.parts[-1].startswith(_SYSTEM_FILES)


def parts_of(path: bytes | str) -> tuple[str, ...]:
    """The parts of a member's path; none for the archive's own folder. Raises UnsafeArchive."""
    if isinstance(path, bytes):
        path = _decode(path)
    if not path or len(path) > _MAX_PATH_CHARS or not path.isprintable() or "\\" in path:
        raise UnsafeArchive(f"{path[:200]!r} is no path of a file in an archive.")
    if path.startswith("/") or _DRIVE.match(path):
        raise UnsafeArchive(f"{path[:200]!r} is an absolute path. Pack the files with relative ones.")
    parts = path.removesuffix("/").split("/")
    if ".." in parts or "" in parts:
        raise UnsafeArchive(f"{path[:200]!r} climbs out of its folder, or has an empty part.")
    if len(parts) > _MAX_PARTS:
        raise UnsafeArchive(f"{path[:200]!r} lies deeper than {_MAX_PARTS} folders.")
    return tuple(part for part in parts if part != ".")


def parts_of_file(path: bytes | str) -> tuple[str, ...]:
    """As `parts_of`, of a plain file: at least its name. Raises UnsafeArchive."""
    parts = parts_of(path)
    text = path if isinstance(path, str) else _decode(path)
    if text.rpartition("/")[2] in ("", "."):
        raise UnsafeArchive(f"{text[:200]!r} is no path of a plain file.")
    return parts


def count_member(number: int) -> None:
    """Raises UnsafeArchive for the first member beyond MAX_MEMBERS."""
    if number > MAX_MEMBERS:
        raise UnsafeArchive(f"the archive has more than {MAX_MEMBERS} members; an adapter needs fewer.")


def cut_short(what: str) -> MalformedArchive:
    return MalformedArchive(f"the archive ends in the middle of {what}: it is truncated. Pack and send it again.")


def _decode(path: bytes) -> str:
    try:
        return path.decode("utf-8")
    except UnicodeDecodeError:
        raise UnsafeArchive(f"{path[:200]!r} is no path of a file in an archive: it is not UTF-8.") from None
