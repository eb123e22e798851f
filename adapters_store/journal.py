"""Tells processes on one store what others changed, for the price of one `stat`: names, appended to a file.

    changes/000007      "+sql\\n" before the files of sql change, "-sql\\n" afterwards, ">000008\\n" as the last line

It is a notice and no truth: whoever reads a name here reads its files again. A "+" without its "-" is a change under
way, or one that a crash cut short; a reader stays in front of it and so reads that name again until it is settled.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_MAX_SEGMENT_BYTES = 1024 * 1024
_NUM_KEPT_SEGMENTS = 2  # a reader that is farther behind reads the whole store again


class Journal:
    """Not thread-safe. `begin` and `end` only under the lock of changes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._segment = 1
        self._offset = 0  # of what is settled
        self.unfinished: str | None = None  # of the last reading: a change under way, or cut short
        self.jump()

    def jump(self) -> None:
        """Goes to the end. What is read from the files after this is not older than the journal says."""
        self._segment, self._offset, self.unfinished = max(self._numbers(), default=1), 0, None
        self._read()

    def poll(self) -> set[str] | None:
        """Names whose files may have changed since the last call; None: any may have. Raises OSError."""
        try:
            if os.stat(self._path(self._segment)).st_size == self._offset:
                return set()
        except FileNotFoundError:
            return self._left_behind(set())
        return self._read()

    @property
    def is_at_end(self) -> bool:
        """Whether `poll` would find nothing new; for the price of one `stat`."""
        try:
            return os.stat(self._path(self._segment)).st_size == self._offset
        except FileNotFoundError:
            return self._left_behind(set()) == set()

    def begin(self, name: str) -> None:
        """Says that the files of `name` are about to change. Raises OSError, and then nothing was said."""
        self._append(f"+{name}\n")
        self.unfinished = name

    def end(self, name: str) -> None:
        """Says that they have. Raises OSError: readers go on reading them again."""
        self._append(f"-{name}\n")
        self._roll()

    def _read(self) -> set[str] | None:
        names: set[str] = set()
        while True:
            try:
                with self._path(self._segment).open("rb") as file:
                    file.seek(self._offset)
                    data = file.read()
            except FileNotFoundError:
                return self._left_behind(names)
            successor = self._take(data, names)
            if successor is None:
                return names
            self._segment, self._offset = successor, 0

    def _left_behind(self, names: set[str]) -> set[str] | None:
        """What to answer where the segment is missing: it is not begun yet, or removed already."""
        return None if max(self._numbers(), default=0) > self._segment else names

    def _take(self, data: bytes, names: set[str]) -> int | None:
        """Adds the names to `names` and moves over what is settled; the segment to go on with, if any."""
        position = self._offset
        self.unfinished = None
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            position += len(line)
            kind, word = line[:1], line[1:-1].decode("ascii", "replace")
            if kind == b">":
                return int(word)
            names.add(word)
            self.unfinished = word if kind == b"+" else None
            if kind == b"-":
                self._offset = position
        return None

    def _append(self, line: str) -> None:
        data = line.encode("ascii")
        descriptor = os.open(self._path(self._segment), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

    def _roll(self) -> None:
        """Goes on in a new segment when this one is long."""
        if os.stat(self._path(self._segment)).st_size < _MAX_SEGMENT_BYTES:
            return
        successor = self._segment + 1
        self._append(f">{successor:06d}\n")
        for number in self._numbers():
            if number <= successor - _NUM_KEPT_SEGMENTS:
                self._path(number).unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        return sorted(int(entry.name) for entry in os.scandir(self._directory) if entry.name.isdecimal())

    def _path(self, segment: int) -> Path:
        return self._directory / f"{segment:06d}"
