"""Who still uses a version: counted holds that keep its bytes on disk, however it is deleted meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType

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

    def __init__(self) -> None:
        self._counts: Counter[VersionKey] = Counter()
        self._waiting: dict[VersionKey, list[Callable[[], object]]] = {}
        self._lock = threading.Lock()

    def take(self, version: AdapterVersion) -> Lease:
        with self._lock:
            self._counts[version.name, version.version] += 1
        return Lease(version, self)

    def give_back(self, version: AdapterVersion) -> None:
        key = (version.name, version.version)
        with self._lock:
            assert self._counts[key] > 0, f"{version} has no lease to give back"
            self._counts[key] -= 1
            if self._counts[key]:
                return
            del self._counts[key]
            callbacks = self._waiting.pop(key, [])
        for callback in callbacks:
            callback()

    def count(self, name: str, version: int) -> int:
        with self._lock:
            return self._counts[name, version]

    def total(self) -> int:
        with self._lock:
            return self._counts.total()

    def when_idle(self, name: str, version: int, callback: Callable[[], object]) -> None:
        """Calls back once nobody holds the version: at once, or in the thread that gives the last lease back."""
        with self._lock:
            if self._counts[name, version]:
                self._waiting.setdefault((name, version), []).append(callback)
                return
        callback()
