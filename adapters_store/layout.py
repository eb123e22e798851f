"""Where things lie in a store's directory, and how they are found again when it is opened.

    store.json                      schema of everything below
    lock                            held by the process that has the store open
    versions/<name>/<n>.json        the commit of a version: it exists once this file has its name
    aliases/<name>/<alias>.json     {"version": 4, "previous": 3}
    tombstones/<name>.json          {"versions": [1, 2]}: numbers that are gone and never come back
    blobs/sha256/<hex>              the bytes of files, each content once
    images/<effect>-<variant>.img   packed images, and beside each a small .json; all may be lost
    staging/                        uploads in progress; emptied at opening

A name's slash is written `%2F`, so adapter "a" and adapter "a/1.json" never meet in one directory.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters_store.durable import make_directory, read_json, remove, remove_tree, write_json
from adapters_store.errors import StoreBusy, StoreDamaged, StoreUnusable
from adapters_store.record import SCHEMA

_MARKER = "store.json"
_LOCK = "lock"


class Layout:
    """The directory of one store, open in this process and in no other."""

    def __init__(self, root: Path) -> None:
        """Opens `root`, creating it if need be.

        Raises:
            StoreBusy: another process (or another Catalog of this one) has it open.
            StoreDamaged: it was written by a newer program, or is something else than a store.
            StoreUnusable: it cannot be made, read or written.
        """
        self.root = root
        try:
            self._lock = _enter(root)
        except OSError as error:
            raise StoreUnusable(
                f"{root} cannot be used as an adapter store: {error.strerror}. Choose a directory that can be written."
            ) from error
        try:
            self._check_schema()
            for path in (self.versions, self.aliases, self.tombstones, self.blobs, self.images, self.staging):
                make_directory(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process open the store. Again is harmless."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def is_open(self) -> bool:
        return self._lock >= 0

    @property
    def versions(self) -> Path:
        return self.root / "versions"

    @property
    def aliases(self) -> Path:
        return self.root / "aliases"

    @property
    def tombstones(self) -> Path:
        return self.root / "tombstones"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs" / "sha256"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    def version_path(self, name: str, version: int) -> Path:
        return self.versions / _encode(name) / f"{version}.json"

    def alias_path(self, name: str, alias: str) -> Path:
        return self.aliases / _encode(name) / f"{alias}.json"

    def tombstone_path(self, name: str) -> Path:
        return self.tombstones / f"{_encode(name)}.json"

    def blob_path(self, sha256: str) -> Path:
        return self.blobs / sha256

    def find_versions(self) -> Iterator[tuple[str, int, Path]]:
        """(name, number, path) of every committed version file; temporary files are removed on the way."""
        for name, path in self._records(self.versions):
            if path.stem.isdecimal():
                yield name, int(path.stem), path

    def find_aliases(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(name, alias, content) of every alias file. Raises StoreDamaged."""
        for name, path in self._records(self.aliases):
            yield name, path.stem, read_json(path)

    def find_tombstones(self) -> Iterator[tuple[str, frozenset[int]]]:
        """(name, numbers that are gone). Raises StoreDamaged."""
        for path in _json_files(self.tombstones):
            yield _decode(path.stem), frozenset(read_json(path)["versions"])

    def sweep_staging(self) -> None:
        for entry in os.scandir(self.staging):
            remove_tree(Path(entry.path))

    def _records(self, parent: Path) -> Iterator[tuple[str, Path]]:
        for entry in os.scandir(parent):
            if entry.is_dir():
                for path in _json_files(Path(entry.path)):
                    yield _decode(entry.name), path

    def _check_schema(self) -> None:
        marker = self.root / _MARKER
        if not marker.exists():
            write_json(marker, {"schema": SCHEMA})
            return
        found = read_json(marker).get("schema")
        if found != SCHEMA:
            raise StoreDamaged(
                f"{self.root} has schema {found!r}; this program reads schema {SCHEMA}. Use the program that wrote it, "
                "or another directory."
            )


def check_store(root: Path) -> None:
    """Opens the store for a moment, creating it if need be. Raises as `Layout`."""
    Layout(root).close()


def _json_files(directory: Path) -> Iterator[Path]:
    for entry in os.scandir(directory):
        if entry.name.endswith(".json"):
            yield Path(entry.path)
        elif entry.name.endswith(".tmp"):
            remove(Path(entry.path))


def _enter(root: Path) -> int:
    """The lock of a directory that is a store or can become one."""
    root.mkdir(parents=True, exist_ok=True)
    foreign = {entry.name for entry in os.scandir(root)} - {_MARKER, _LOCK, f"{_MARKER}.tmp"}
    if foreign and not (root / _MARKER).exists():
        raise StoreDamaged(f"{root} is not empty and no adapter store. Choose an empty or a new directory.")
    return _hold(root / _LOCK)


def _hold(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StoreBusy(
            f"the adapter store {path.parent} is open in another process. Stop that one, or give this one a store "
            "directory of its own."
        ) from error
    return descriptor


def _encode(name: str) -> str:
    return name.replace("/", "%2F")


def _decode(stem: str) -> str:
    return stem.replace("%2F", "/")
