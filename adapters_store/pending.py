"""Files that were sent by their digest, ahead of the upload that names them.

    received/<hex>     one file, whole and verified; gone a day after it was last asked for

A client that sends an adapter's files one by one can go on after a lost connection where it stopped, and two adapters
with the same file send it once. Naming them costs a hard link.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from adapters_store.durable import make_directory, move_file, raise_if_full, remove
from adapters_store.errors import BlobNotFound, InvalidName
from adapters_store.staging import Stage

KEEP_S = 24 * 3600.0
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.ASCII)


def parse_digest(text: str) -> str:
    """64 hex digits of `sha256:<hex>` or `<hex>`. Raises InvalidName."""
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise InvalidName(f"{text[:100]!r} is no digest: sha256: and 64 lower-case hex digits.")
    return match[1]


class PendingFiles:
    """Those of one store. Several processes may share it: a file appears and goes by one rename or removal."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "received"

    def size(self, sha256: str) -> int | None:
        """Bytes of the file, None where there is none. Asking keeps it for another day."""
        path = self._folder / sha256
        try:
            os.utime(path)
            return path.stat().st_size
        except FileNotFoundError:
            return None

    def keep(self, stage: Stage, path: str, sha256: str) -> None:
        """Takes a complete file of a stage over. Its digest has been verified by the stage. Raises DiskFull."""
        try:
            make_directory(self._folder)
            self.sweep()
            move_file(stage.path_of(path), self._folder / sha256)
        except OSError as error:
            raise_if_full(error)
            raise

    def name(self, stage: Stage, path: str, sha256: str) -> None:
        """Puts a file into a stage under its name there. Raises BlobNotFound, FileRefused, TooLarge."""
        num_bytes = self.size(sha256)
        if num_bytes is None:
            raise BlobNotFound(f"there is no blob sha256:{sha256}. Send it first, or send the file itself.")
        stage.adopt(path, self._folder / sha256, num_bytes, sha256)

    def sweep(self) -> None:
        """Removes what nobody asked for within a day."""
        oldest = time.time() - KEEP_S
        with contextlib.suppress(FileNotFoundError):
            for entry in list(os.scandir(self._folder)):
                if entry.stat().st_mtime < oldest:
                    remove(Path(entry.path))
