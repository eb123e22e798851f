"""Who changed what, when: lines of JSON that are only ever appended, in the store that they tell of.

    audit.jsonl    {"at": "...", "actor": "admin key 1", "action": "alias.set", "target": "sql@prod", "detail": {...}}

A line is on disk when `append` returns. Several processes may append: a lock is held for the moment of writing, and
what a crash left of a line is closed off, so that it spoils no other.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapters_store.durable import raise_if_full, sync_directory
from adapters_store.errors import DiskFull

FILE_NAME = "audit.jsonl"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    actor: str  # "admin key 1", "loopback", "canary"; never a key
    action: str  # "alias.set"
    target: str  # "sql@prod"
    detail: dict[str, Any] = field(default_factory=dict)
    request_id: str | None = None
    at: str = ""  # RFC 3339, UTC; set when it is appended


class AuditLog:
    """The log of the store in `root`. Any thread of any process may append and read."""

    def __init__(self, root: Path) -> None:
        self.path = root / FILE_NAME

    def append(self, entry: AuditEntry) -> AuditEntry:
        """Writes one line to the disk; the entry with its time. Raises DiskFull, OSError."""
        stamped = AuditEntry(
            entry.actor, entry.action, entry.target, entry.detail, entry.request_id, entry.at or _now()
        )
        line = json.dumps(asdict(stamped), separators=(",", ":"), default=str).encode("ascii") + b"\n"
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _write_all(descriptor, line if _ends_whole(descriptor) else b"\n" + line)
            os.fsync(descriptor)
        except OSError as error:
            raise_if_full(error)
            raise
        finally:
            os.close(descriptor)
        if is_new:
            sync_directory(self.path.parent)
        return stamped

    def note(self, entry: AuditEntry) -> None:
        """As `append`, of a change that has happened: a line that cannot be written stops nothing, and is logged."""
        try:
            self.append(entry)
        except (OSError, DiskFull) as error:
            logger.error("the audit log could not be written (%s): %s", error, entry)

    def tail(self, limit: int, *, target: str = "") -> list[AuditEntry]:
        """The last entries, youngest first; with `target` those of one adapter. Reads the whole file."""
        wanted = (entry for entry in self._entries() if not target or _is_of(entry, target))
        return list(reversed(deque(wanted, maxlen=limit)))

    def _entries(self) -> Iterator[AuditEntry]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                entry = _read(line)
                if entry is not None:
                    yield entry


def _is_of(entry: AuditEntry, name: str) -> bool:
    return entry.target == name or entry.target.startswith(name + "@")


def _read(line: bytes) -> AuditEntry | None:
    """None for what a crash left of a line."""
    try:
        return AuditEntry(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _ends_whole(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
