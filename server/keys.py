"""The keys file: who may do what on which adapters. It holds digests of keys, never a key.

    {"schema": 1, "keys": [{"name": "bi", "sha256": "9f86...", "scopes": ["generate"], "adapters": ["sql", "bi/*"],
                            "base": true, "tenant": "bi", "created_at": "2026-11-25T12:00:00Z", "expires_at": null}]}

Keys are drawn here, with 256 bits, so their plain SHA-256 tells nothing about them and needs no salt and no slow hash.
Changes replace the file as a whole, under a lock, so that a server that reads it meanwhile sees the old file or the new
one. This file knows neither HTTP nor the settings.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Scope = Literal["read", "generate", "admin"]
SCHEMA = 1
KEY_PREFIX = "vnr_"  # so that scanners of leaked secrets can tell what they found
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_PATTERN = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._/-]{0,199}\*?", re.ASCII)
log = logging.getLogger("veneer.keys")


class KeysFileError(Exception):
    """The keys file is missing or broken, or a name in it is taken or unknown."""


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no name: letters, digits, '.', '_' and '-', 1 to 64, no mark first")
    return name


def _check_pattern(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern):
        raise ValueError(f"{pattern[:80]!r} names no adapters: a name, a beginning like bi/*, or * for all")
    return pattern


Name = Annotated[str, AfterValidator(_check_name)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]


class KeyRecord(BaseModel):
    """One key and what it opens. `adapters` holds names, beginnings like `bi/*`, or `*`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = Field(min_length=1)
    adapters: tuple[Pattern, ...] = ("*",)
    base: bool = True  # whether it may use the base without an adapter
    tenant: Name | None = None  # keys of one tenant share prefix caches; None: the key shares with nobody
    created_at: datetime
    expires_at: datetime | None = None

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and now >= self.expires_at


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_: Literal[1] = Field(alias="schema")
    keys: list[KeyRecord]


def digest_of(key: str) -> str:
    """SHA-256 in hex; what no UTF-8 can spell is hashed all the same."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def draw_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> list[KeyRecord]:
    """The records of a keys file. Raises KeysFileError."""
    try:
        content = _Content.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise KeysFileError(f"there is no keys file {path}. Make one with `veneer keys add`.") from None
    except OSError as error:
        raise KeysFileError(f"the keys file {path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise KeysFileError(f"{path} is no keys file: {where or 'the whole'}: {problem['msg']}.") from None
    for field in ("name", "sha256"):
        seen = [getattr(record, field) for record in content.keys]
        if len(set(seen)) < len(seen):
            raise KeysFileError(f"{path}: two keys have the same {field}; every key has its own.")
    for record in content.keys:
        if any(moment is not None and moment.tzinfo is None for moment in (record.created_at, record.expires_at)):
            raise KeysFileError(f"{path}: the times of key {record.name!r} need a zone, e.g. 2026-11-25T12:00:00Z.")
    return content.keys


class KeysFile:
    """The keys of a file, read again when the file changes. `find` costs one `stat`; belongs to one thread."""

    def __init__(self, path: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Raises KeysFileError."""
        self._path = path
        self._now = now
        self._seen = _stamp(path)
        self._records = _by_digest(read_keys(path))

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key that is valid now.

        A dictionary is enough: how long it takes to miss tells something about a digest, and nothing about a key.
        """
        self._refresh()
        record = self._records.get(digest_of(key))
        return None if record is None or record.is_expired(self._now()) else record

    def _refresh(self) -> None:
        """While the file is broken, the keys of its last sound state hold: no typo opens or closes a server."""
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._records = _by_digest(read_keys(self._path))
        except KeysFileError as error:
            log.error("the keys stay as they were: %s", error)
            return
        log.info("read %d keys from %s", len(self._records), self._path)


def add_key(path: Path, record: KeyRecord) -> None:
    """Add one record, making the file if there is none. Raises KeysFileError."""
    with _changing(path):
        records = read_keys(path) if path.exists() else []
        if any(record.name == other.name for other in records):
            raise KeysFileError(f"{path} has a key named {record.name!r}; revoke it first, or choose another name.")
        _write(path, [*records, record])


def revoke_key(path: Path, name: str) -> None:
    """Remove one record. Raises KeysFileError."""
    with _changing(path):
        records = read_keys(path)
        kept = [record for record in records if record.name != name]
        if len(kept) == len(records):
            raise KeysFileError(f"{path} has no key named {name!r}.")
        _write(path, kept)


def _by_digest(records: list[KeyRecord]) -> dict[str, KeyRecord]:
    return {record.sha256: record for record in records}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """One change at a time, by a lock on the directory: a lock on the file would go with the file it replaces."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysFileError(f"{path.parent} cannot hold a keys file: {error.strerror}.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    except OSError as error:
        raise KeysFileError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        os.close(descriptor)


def _write(path: Path, records: list[KeyRecord]) -> None:
    """Replace the file; only its owner may read it."""
    content = {"schema": SCHEMA, "keys": [record.model_dump(mode="json") for record in records]}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
