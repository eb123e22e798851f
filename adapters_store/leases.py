"""Who still uses a version: counted holds that keep its bytes on disk, however it is deleted meanwhile.

Within a process leases are counted; while the count of a version is above zero, the process holds a lock on it that
every other process on the store sees.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from adapters_store.locks import StoreLocks
from adapters_store.record import AdapterVersion

VersionKey = tuple[str, int]  # (name, number)


class Lease:
    """One hold on one version; ends by `release` or with its `with` block. Releasing again is harmless."""

    def __init__(self, version: AdapterVersion, book: LeaseBook) -> None:
        self.version = version
        self._book: LeaseBook | None = book

    def release(self) -> None:
        book, self._book = self._book, None
        if book is not None:
            book.give_back(self.version)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class LeaseBook:
    """Counts leases per version. Any thread may take and give back."""

    def __init__(self, locks: StoreLocks, on_idle: Callable[[AdapterVersion], object]) -> None:
        """`on_idle` is told of every version that nobody in this process holds any more."""
        self._counts: Counter[VersionKey] = Counter()
        self._waiting: dict[VersionKey, list[Callable[[], object]]] = {}
        self._lock = threading.Lock()
        self._locks = locks
        self._on_idle = on_idle

    def take(self, version: AdapterVersion) -> Lease | None:
        """None while some process removes the version's bytes. A caller that got one looks whether they are there."""
        key = (version.name, version.version)
        with self._lock:
            if not self._counts[key] and not self._locks.share(str(version)):
                del self._counts[key]
                return None
            self._counts[key] += 1
        return Lease(version, self)

    def give_back(self, version: AdapterVersion) -> None:
        key = (version.name, version.version)
        with self._lock:
            assert self._counts[key] > 0, f"{version} has no lease to give back"
            self._counts[key] -= 1
            if self._counts[key]:
                return
            del self._counts[key]
            self._locks.unshare(str(version))
            callbacks = self._waiting.pop(key, [])
        for callback in callbacks:
            callback()
        self._on_idle(version)

    def count(self, name: str, version: int) -> int:
        with self._lock:
            return self._counts[name, version]

    def total(self) -> int:
        with self._lock:
            return self._counts.total()

    def when_idle(self, name: str, version: int, callback: Callable[[], object]) -> None:
        """Calls back once nobody here holds the version: at once, or in the thread that gives the last lease back."""
        with self._lock:
            if self._counts[name, version]:
                self._waiting.setdefault((name, version), []).append(callback)
                return
        callback()
