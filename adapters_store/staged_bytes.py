"""What the uploads and downloads under way take on the disk together, within a bound.

room = StagedBytes(max_bytes=2**34)
share = room.share()
share.reserve(2**30)      announced: counted before the first byte
share.add(2**20)          arrived: counted where it goes beyond what was announced
share.give_back()
"""

from __future__ import annotations

import threading

from adapters_store.errors import StagingFull


class StagedBytes:
    """Of one process. Any thread may call."""

    def __init__(self, max_bytes: int | None) -> None:
        """`max_bytes` None: as much as the disk takes."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()

    def share(self) -> StagedShare:
        """The part of one stage; nothing yet."""
        return StagedShare(self)

    def _take(self, num_bytes: int) -> None:
        with self._lock:
            if self.max_bytes is not None and self.num_bytes + num_bytes > self.max_bytes:
                raise StagingFull(
                    f"uploads and downloads under way take {self.num_bytes} bytes together, and {num_bytes} more are "
                    f"over the limit of {self.max_bytes}. Try again when some have ended."
                )
            self.num_bytes += num_bytes

    def _give(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes -= num_bytes


class StagedShare:
    """Not thread-safe but for what it takes from the whole."""

    def __init__(self, whole: StagedBytes) -> None:
        self._whole = whole
        self._counted = 0
        self._arrived = 0

    def reserve(self, num_bytes: int) -> None:
        """Counts what is announced. Raises StagingFull."""
        if num_bytes > self._counted:
            self._whole._take(num_bytes - self._counted)
            self._counted = num_bytes

    def add(self, num_bytes: int) -> None:
        """Counts what arrives. Raises StagingFull."""
        self._arrived += num_bytes
        self.reserve(self._arrived)

    def give_back(self) -> None:
        """Again is harmless."""
        counted, self._counted = self._counted, 0
        self._whole._give(counted)
