"""Where things lie in a store's directory.

    store.json                      schema of everything below
    lock, locks                     held by the processes that have the store open, see `locks.py`
    versions/<name>/<n>.json        the commit of a version: it exists once this file has its name
    aliases/<name>/<alias>.json     what an alias means and meant, see `alias.py`
    attributes/<name>.json          labels, pins and the like, see `attributes.py`
    tombstones/<name>.json          {"versions": [1, 2]}: numbers that are gone and never come back
    rules/<name>/<alias>.json       what has to hold before and after an alias moves, see `alias_rules.py`
    audit.jsonl                     who changed what, for people, see `audit_log.py`
    changes/<n>                     who changed what, for other processes, see `journal.py`; may be lost
    blobs/sha256/<hex>              the bytes of files, each content once
    images/<effect>-<variant>.img   packed images, and beside each a small .json; all may be lost
    staging/<process>-<upload>/     uploads in progress
    received/<hex>                  files sent ahead of their upload, see `pending.py`; gone a day after the last use
    answers/<hex>.json              what was answered to requests with a key, see `answers.py`; may be lost
    warm/<host>-<base>.json         what was on the device of a host, for its next start; may be lost
    usage/<day>-<host>-<nonce>.jsonl    what every key used, written and read by the server

A name's slash is written `%2F`, so adapter "a" and adapter "a/1.json" never meet in one directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from adapters_store.durable import is_temporary, make_directory, read_json
from adapters_store.errors import StoreBusy, StoreDamaged, StoreUnusable
from adapters_store.schema import MARKER, settle_schema

_LOCK = "lock"
_LOCKS = "locks"
_UNLOCKED = ("warm", "answers")  # folders of small files that are written without the lock of changes
_LONGEST_WRITE_S = 3600.0


class Layout:
    """The directory of one store, which other processes may have open too."""

    def __init__(self, root: Path) -> None:
        """Opens `root`, creating it if need be, and brings an older store up to date.

        Raises:
            StoreBusy: a process of an older release has it open.
            StoreDamaged: it was written by a newer program, or is something else than a store.
            StoreUnusable: it cannot be made, read or written.
        """
        self.root = root
        self.locks = root / _LOCKS
        self.versions = root / "versions"
        self.aliases = root / "aliases"
        self.attributes = root / "attributes"
        self.tombstones = root / "tombstones"
        self.small_files = (self.versions, self.aliases, self.attributes, self.tombstones)  # what was committed
        self.rules = root / "rules"
        self.changes = root / "changes"
        self.blobs = root / "blobs" / "sha256"
        self.images = root / "images"
        self.staging = root / "staging"
        try:
            self._lock = _enter(root)
        except OSError as error:
            raise StoreUnusable(
                f"{root} cannot be used as an adapter store: {error.strerror}. Choose a directory that can be written."
            ) from error
        try:
            settle_schema(root, self.locks)
            for path in (*self.small_files, self.changes, self.blobs, self.images, self.staging):
                make_directory(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends this process's use of the store. Again is harmless."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def is_open(self) -> bool:
        return self._lock >= 0

    def version_path(self, name: str, version: int) -> Path:
        return self.versions / f"{_encode(name)}/{version}.json"

    def alias_path(self, name: str, alias: str) -> Path:
        return self.aliases / f"{_encode(name)}/{alias}.json"

    def attributes_path(self, name: str) -> Path:
        return self.attributes / f"{_encode(name)}.json"

    def tombstone_path(self, name: str) -> Path:
        return self.tombstones / f"{_encode(name)}.json"

    def rules_directory(self, name: str) -> Path:
        return self.rules / _encode(name)

    def blob_path(self, sha256: str) -> Path:
        return self.blobs / sha256

    def blob_size(self, sha256: str) -> int | None:
        """Bytes of a blob; None where it is missing."""
        try:
            return os.stat(f"{self.blobs}/{sha256}").st_size
        except OSError:
            return None

    def names(self) -> list[str]:
        """Every name of which anything is written, sorted."""
        found = {entry for parent in (self.versions, self.aliases) for entry in os.listdir(parent)}
        for parent in (self.tombstones, self.attributes):
            found.update(_stems(parent))
        return sorted(_decode(entry) for entry in found)

    def names_with_rules(self) -> list[str]:
        """Every name that has a folder of rules, sorted."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(_decode(entry) for entry in os.listdir(self.rules))
        return []

    def version_numbers(self, name: str) -> list[int]:
        """Numbers of the version files of a name."""
        return [int(stem) for stem in _stems(f"{self.versions}/{_encode(name)}") if stem.isdecimal()]

    def alias_names(self, name: str) -> list[str]:
        return _stems(f"{self.aliases}/{_encode(name)}")

    def read_tombstone(self, name: str) -> frozenset[int]:
        """Numbers that are gone. Raises StoreDamaged."""
        try:
            return frozenset(int(number) for number in read_json(self.tombstone_path(name))["versions"])
        except FileNotFoundError:
            return frozenset()
        except (KeyError, TypeError, ValueError) as error:
            raise StoreDamaged(f"{self.tombstone_path(name)} lacks or mistypes {error}.") from error

    def temporary_files(self) -> Iterator[Path]:
        """Small files that were being written. Under the lock of changes nobody writes them any more.

        What is written without that lock counts when it is too old to be still going on.
        """
        for parent in (*self.small_files, self.rules):
            yield from _temporary(parent)
        oldest_s = time.time() - _LONGEST_WRITE_S
        for parent in (self.root / name for name in _UNLOCKED):
            yield from (path for path in _temporary(parent) if _changed_s(path) < oldest_s)


def check_store(root: Path) -> None:
    """Opens the store for a moment, creating it if need be. Raises as `Layout`."""
    Layout(root).close()


def _temporary(parent: Path) -> Iterator[Path]:
    for directory, _, files in os.walk(parent):
        yield from (Path(directory, file) for file in files if is_temporary(file))


def _changed_s(path: Path) -> float:
    """Unix time of its last change; of one that is gone meanwhile, now."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _stems(directory: Path | str) -> list[str]:
    """Names of the JSON files in a directory, without their suffix; of a missing one, none."""
    with contextlib.suppress(FileNotFoundError):
        return [entry[:-5] for entry in os.listdir(directory) if entry.endswith(".json")]
    return []


def _enter(root: Path) -> int:
    """A hold on a directory that is a store or can become one."""
    root.mkdir(parents=True, exist_ok=True)
    ours = {MARKER, _LOCK, _LOCKS}
    foreign = {entry for entry in os.listdir(root) if entry not in ours and not is_temporary(entry)}
    if foreign and not (root / MARKER).exists():
        raise StoreDamaged(f"{root} is not empty and no adapter store. Choose an empty or a new directory.")
    return _hold(root / _LOCK)


def _hold(path: Path) -> int:
    """Beside other processes of this release; one of schema 1 wants the store for itself."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StoreBusy(
            f"the adapter store {path.parent} is open in another process, of a release that does not share. Stop that "
            "one, or give this one a store directory of its own."
        ) from error
    return descriptor


def _encode(name: str) -> str:
    return name.replace("/", "%2F")


def _decode(stem: str) -> str:
    return stem.replace("%2F", "/")
