"""Directories of the server's machine, below the roots that its operator allows and nowhere else.

Links are followed to their end before the roots are asked, and every file is held against them again once it is open,
so that a link put in between leads nowhere. Whether something exists outside of the roots is not told.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from adapters_store.record import Source
from server.library.directory import adapter_in
from server.library.errors import SourceForbidden, SourceNotFound, SourceUnavailable
from server.library.sources.listing import CHUNK_BYTES, Listing, SourceFile, choose_files


class LocalSource:
    def __init__(self, path: str, roots: tuple[Path, ...]) -> None:
        """Raises SourceForbidden outside of the roots."""
        self._path = path
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self._home = self._allowed(Path(os.path.realpath(path)))

    def list_files(self) -> Listing:
        """Raises SourceNotFound, SourceForbidden, FileRefused."""
        if not self._home.is_dir():
            raise SourceNotFound(f"there is no directory {self._path}.")
        home = self._allowed(Path(os.path.realpath(adapter_in(self._home))))
        found, stamp = [], {}
        for entry in sorted(os.scandir(home), key=lambda entry: entry.name):
            if entry.is_file():
                facts = entry.stat()
                found.append(SourceFile(entry.name, entry.path, facts.st_size))
                stamp[entry.name] = [facts.st_size, facts.st_mtime_ns]
        files = choose_files(found, self._path)
        return Listing(files, Source(home.as_uri(), None, {file.name: stamp[file.name] for file in files}))

    def read(self, file: SourceFile) -> Iterator[bytes]:
        """Raises SourceForbidden, SourceUnavailable."""
        try:
            # Not blocking: a pipe in the place of the file would wait for its writer for ever.
            descriptor = os.open(os.path.realpath(file.key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise SourceUnavailable(f"{file.key} cannot be read: {error.strerror}.") from error
        with open(descriptor, "rb") as opened:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SourceForbidden(f"{file.key} is no plain file.")
            self._allowed(Path(os.path.realpath(f"/proc/self/fd/{descriptor}")))
            while chunk := opened.read(CHUNK_BYTES):
                yield chunk

    def _allowed(self, path: Path) -> Path:
        if any(path.is_relative_to(root) for root in self._roots):
            return path
        raise SourceForbidden(
            f"{self._path} is not below a directory that this server may read adapters from. Upload the adapter, or "
            "start the server with --adapter-roots naming its directory."
        )
