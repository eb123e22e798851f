"""Locks that processes on one store hold against each other, on this host and on others: a byte of one file each.

    with locks.alone(CHANGE): ...     one process at a time changes the store
    locks.share("sql@3")              this process uses sql@3, until `unshare`
    with locks.tried("sql@3") as is_free: ...    whether no process uses it, and none can begin to meanwhile

They belong to the open file, so they end with the process however it ends, they are seen between two catalogues of one
process, and a thousand of them cost one file descriptor. On NFS they need version 4 or a lock daemon.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from adapters_store.errors import StoreBusy, StoreUnusable

CHANGE = "change"

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
_MAX_PAUSE_S = 0.02


class Claim:
    """A key that one piece of work has for itself, against every other piece in this process and in others.

    It is held by an open file of its own, so it ends with the process however that ends.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, key: str) -> Claim | None:
        """None while somebody else has it. `path` is the file of the store's locks. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _set_lock(descriptor, fcntl.F_WRLCK, key)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Again is harmless."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class StoreLocks:
    """Any thread may call."""

    def __init__(self, path: Path) -> None:
        """Raises StoreUnusable where the file system has no locks."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._path = path
        self._held = os.open(path, flags, 0o644)
        self._tried = os.open(path, flags, 0o644)  # locks of one open file never conflict with each other
        self._trying = threading.Lock()
        try:
            self._set(self._held, fcntl.F_RDLCK, "probe")
            self._set(self._held, fcntl.F_UNLCK, "probe")
        except OSError as error:
            self.close()
            raise StoreUnusable(f"{path.parent} lies on a file system without locks ({error.strerror}).") from error

    def close(self) -> None:
        """Gives everything up. Again is harmless."""
        for descriptor in (self._held, self._tried):
            if descriptor >= 0:
                os.close(descriptor)
        self._held = self._tried = -1

    def share(self, key: str) -> bool:
        """Uses `key` beside other users; False while someone has it alone. Sharing twice counts once."""
        return self._try(self._held, fcntl.F_RDLCK, key)

    def unshare(self, key: str) -> None:
        if self._held >= 0:
            self._set(self._held, fcntl.F_UNLCK, key)

    @contextlib.contextmanager
    def alone(self, key: str, timeout_s: float) -> Iterator[None]:
        """Waits for `key`. Raises StoreBusy after `timeout_s`. Threads of one catalogue must not meet here."""
        deadline, pause = time.monotonic() + timeout_s, 0.0005
        while not self._try(self._held, fcntl.F_WRLCK, key):
            if time.monotonic() > deadline:
                raise StoreBusy(
                    f"another process has kept the adapter store {self._path.parent} locked for {timeout_s:g} s. "
                    "Try again, or find out what it waits for."
                )
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_S)
        try:
            yield
        finally:
            self.unshare(key)

    @contextlib.contextmanager
    def tried(self, key: str) -> Iterator[bool]:
        """Whether nobody, this catalogue included, uses `key`; if so nobody begins to until the block ends."""
        with self.tried_all((key,)) as is_free:
            yield is_free

    @contextlib.contextmanager
    def tried_all(self, keys: Iterable[str]) -> Iterator[bool]:
        """As `tried`, for all of them together."""
        wanted, taken = set(keys), set[str]()
        with self._trying:
            try:
                while taken != wanted and self._try(self._tried, fcntl.F_WRLCK, key := (wanted - taken).pop()):
                    taken.add(key)
                yield taken == wanted
            finally:
                for key in taken:
                    self._set(self._tried, fcntl.F_UNLCK, key)

    def _try(self, descriptor: int, kind: int, key: str) -> bool:
        try:
            self._set(descriptor, kind, key)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def _set(self, descriptor: int, kind: int, key: str) -> None:
        _set_lock(descriptor, kind, key)


def _set_lock(descriptor: int, kind: int, key: str) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, _offset(key), 1, 0))


def _offset(key: str) -> int:
    """Two keys on one byte would only make one of them seem in use a while longer; one in 2**62 pairs is."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 2
