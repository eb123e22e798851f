"""What was answered to requests whose senders named them with a key, so that one that comes again is not done again.

    answers/<hex>.json     one answer, whole; gone after a day, or when newer ones want the room

    claim = book.claim(key)          None while a request of that key is under way, in whatever process
    book.find(key)                   the answer that was kept, if there is one
    book.keep(key, answer)

Every process on the store finds what another kept. Losing them costs no more than that a request is done again.
"""

from __future__ import annotations

import base64
import contextlib
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters_store.durable import make_directory, raise_if_full, read_json, remove, write_json
from adapters_store.errors import StoreDamaged
from adapters_store.locks import Claim

DIRECTORY = "answers"
KEEP_S = 24 * 3600.0
MAX_ANSWERS = 10_000
MAX_BYTES = 64 * 2**20  # of all of them on the disk; the newest stays whatever its size
_SWEEP_EVERY = 64  # answers kept between two looks at the bounds


@dataclass(frozen=True, slots=True)
class Answer:
    head: str  # digest of what was asked, but for the body
    body: str  # digest of the body that was sent
    status: int
    headers: Mapping[str, str]
    content: bytes


class AnswerBook:
    """Those of the store in `root`. Any thread may call; `key` is hex digits."""

    def __init__(self, root: Path) -> None:
        self._folder = root / DIRECTORY
        self._locks = root / "locks"
        self._num_kept = 0

    def claim(self, key: str) -> Claim | None:
        """The right to carry out the request of this key; None while another has it. Raises OSError."""
        return Claim.take(self._locks, f"answer {key}")

    def find(self, key: str) -> Answer | None:
        """What was kept within the last day."""
        path = self._path(key)
        try:
            if path.stat().st_mtime < time.time() - KEEP_S:
                return None
            said = read_json(path)
            content = zlib.decompress(base64.b64decode(said["content"]))
            return Answer(said["head"], said["body"], int(said["status"]), dict(said["headers"]), content)
        except (OSError, StoreDamaged, KeyError, TypeError, ValueError, zlib.error):
            return None  # gone, or cut short: the request is done again

    def keep(self, key: str, answer: Answer) -> None:
        """Remembers an answer for a day. Raises DiskFull, OSError: it is not remembered."""
        content = base64.b64encode(zlib.compress(answer.content)).decode("ascii")
        said = {"head": answer.head, "body": answer.body, "status": answer.status, "headers": dict(answer.headers)}
        try:
            make_directory(self._folder)
            write_json(self._path(key), {**said, "content": content})
        except OSError as error:
            raise_if_full(error)
            raise
        if self._num_kept % _SWEEP_EVERY == 0:
            self.sweep()
        self._num_kept += 1

    def sweep(self) -> int:
        """Removes what is older than a day, then the oldest beyond the bounds; how many went."""
        found: list[tuple[float, int, str]] = []  # (time, bytes, path)
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._folder):
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    found.append((facts.st_mtime, facts.st_size, entry.path))
        found.sort(reverse=True)
        oldest_s, num_bytes, num_removed = time.time() - KEEP_S, 0, 0
        for number, (changed_s, size, path) in enumerate(found):
            num_bytes += size
            if changed_s < oldest_s or number >= MAX_ANSWERS or (number and num_bytes > MAX_BYTES):
                remove(Path(path))
                num_removed += 1
        return num_removed

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"
