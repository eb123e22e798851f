"""The usage ledger: what every key has used of every adapter version, in files that only grow.

    <store>/usage/2026-11-25-<host>-<nonce>.jsonl      one file a server process and day (UTC), a line a group:
    {"key": "bi", "adapter": "sql", "version": 3, "requests": 2, "unfinished": 0, "prompt_tokens": 40, ...}

What ends while a group is being written makes the next group, so a busy server writes few lines and each is on disk a
moment after its requests have ended: a crash loses the last quarter of a second at most. A line cut off by a crash is
the last of its file, because every process begins files of its own, and is skipped. Any number of servers may share
the directory; reading adds up what all of them wrote.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

_PAUSE_S = 0.2  # between two groups
_RETRY_S = 5.0  # after a disk that is full
_FILE_DAY = re.compile(r"(\d{4}-\d{2}-\d{2})-.+\.jsonl")
log = logging.getLogger("veneer.usage")


class Account(NamedTuple):
    """Who used what. `key` is the key's name, "" for callers without one; adapter "" and version 0 are the base."""

    key: str
    adapter: str
    version: int


@dataclass(frozen=True, slots=True)
class Use:
    requests: int = 0
    unfinished: int = 0  # of the requests: aborted by the caller, or failed
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens: found in the prefix cache
    generated_tokens: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Use)))


class UsageLedger:
    """Writes the usage of one process. `note` costs an addition; a thread of its own writes and syncs."""

    def __init__(self, directory: Path, today: Callable[[], date] = lambda: datetime.now(UTC).date()) -> None:
        """Raises OSError when the directory cannot be made."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._today = today
        self._pending: dict[Account, Use] = {}
        self._lock = threading.Lock()
        self._has_news = threading.Event()
        self._is_closing = threading.Event()
        self._file: int | None = None
        self._day = today()
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def note(self, account: Account, use: Use) -> None:
        with self._lock:
            self._pending[account] = self._pending.get(account, Use()) + use
        self._has_news.set()

    def close(self) -> None:
        """Everything noted is on disk when this returns, if the disk takes it. Again is harmless."""
        self._is_closing.set()
        self._has_news.set()
        self._thread.join()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _run(self) -> None:
        while True:
            self._has_news.wait()
            self._has_news.clear()  # before the look at `_is_closing`, whose news would be lost else
            is_last = self._is_closing.is_set()
            with self._lock:
                group, self._pending = self._pending, {}
            if group and not self._wrote(group):
                self._take_back(group)
            if is_last:
                return
            self._is_closing.wait(_RETRY_S if self._is_failing else _PAUSE_S)

    def _wrote(self, group: Mapping[Account, Use]) -> bool:
        try:
            self._write(group)
        except OSError as error:
            if not self._is_failing:
                log.error("usage cannot be written to %s, and is kept in memory: %s", self.directory, error)
            self._is_failing = True
            return False
        self._is_failing = False
        return True

    def _take_back(self, group: Mapping[Account, Use]) -> None:
        with self._lock:
            for account, use in group.items():
                self._pending[account] = self._pending.get(account, Use()) + use
        self._has_news.set()

    def _write(self, group: Mapping[Account, Use]) -> None:
        """All lines or none: what a failure leaves of them is cut off again."""
        if self._file is not None and self._day != self._today():
            os.close(self._file)
            self._file = None
        if self._file is None:
            self._day = self._today()
            self._file = _new_file(self.directory, self._day)
        data = "".join(json.dumps(account._asdict() | asdict(use)) + "\n" for account, use in group.items()).encode()
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) < len(data):
                raise OSError("the disk took a part of it")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise


def read_usage(directory: Path, since: date | None = None, until: date | None = None) -> dict[Account, Use]:
    """What all servers wrote from `since` to `until` (days in UTC, both included), by account."""
    totals: dict[Account, Use] = {}
    for path in sorted(directory.glob("*.jsonl")):
        match = _FILE_DAY.fullmatch(path.name)
        if match is None:
            continue
        day = date.fromisoformat(match[1])
        if (since is None or since <= day) and (until is None or day <= until):
            for account, use in _read_file(path, path.stat().st_size).items():
                totals[account] = totals.get(account, Use()) + use
    return totals


@functools.lru_cache(maxsize=4096)
def _read_file(path: Path, size: int) -> Mapping[Account, Use]:
    """The first `size` bytes of a file added up; a file only grows, so its size says whether this was done before."""
    counts: dict[Account, Counter[str]] = {}
    for account, numbers in _whole_lines(path, size):
        counts.setdefault(account, Counter()).update(numbers)
    known = {field.name for field in fields(Use)}
    return {
        account: Use(**{name: number for name, number in count.items() if name in known})
        for account, count in counts.items()
    }


def _whole_lines(path: Path, size: int) -> Iterator[tuple[Account, dict[str, int]]]:
    with path.open("rb") as file:
        for line in file.read(size).splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return  # cut off by a crash, or being written just now
            try:
                found = json.loads(line)
                account = Account(str(found.pop("key")), str(found.pop("adapter")), int(found.pop("version")))
                numbers = {name: int(number) for name, number in found.items()}
            except (ValueError, TypeError, KeyError, AttributeError):
                log.warning("a line of %s is damaged and not counted", path)
                continue
            yield account, numbers


def _new_file(directory: Path, day: date) -> int:
    host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64]
    path = directory / f"{day.isoformat()}-{host}-{secrets.token_hex(4)}.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    return descriptor
