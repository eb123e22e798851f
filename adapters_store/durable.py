"""The few ways in which this package changes a disk, each complete or without effect.

    write_file   new bytes under a temporary name -> fsync -> rename -> fsync of the directory
    create_file  the same, but never over a file that is there: of several who try, on whatever hosts, one succeeds
    move_file    an already synced file gets its final name -> fsync of the directory
    remove       gone for good; what was gone already is no error

After a crash a name therefore holds either the old bytes or the new ones, whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_store.errors import DiskFull, StoreDamaged

TEMPORARY_SUFFIX = ".tmp"

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def is_temporary(name: str) -> bool:
    """Whether a file of this name was being written, and may be cut short."""
    return name.endswith(TEMPORARY_SUFFIX)


def make_directory(path: Path) -> None:
    """Creates `path` and its parents; each new entry is on disk when this returns."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Makes `path` hold `data`, whatever it held. Raises DiskFull."""
    temporary = _write_beside(path, data)
    try:
        move_file(temporary, path)
    except OSError as error:
        remove(temporary)
        raise_if_full(error)
        raise


def create_file(path: Path, data: bytes) -> None:
    """Makes a new file. Raises FileExistsError if there is one, DiskFull."""
    temporary = _write_beside(path, data)
    try:
        _link(temporary, path)
        sync_directory(path.parent)
    finally:
        remove(temporary)


def _link(source: Path, target: Path) -> None:
    """Gives a file a name that is free."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():  # no links here: the lock of changes has to do
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        os.replace(source, target)


def _write_beside(path: Path, data: bytes) -> Path:
    """A synced temporary file next to `path`. Raises DiskFull."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remove(temporary)
        raise_if_full(error)
        raise
    return temporary


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_file(path, json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """As every small file of a store is written."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Raises StoreDamaged if the file is not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise StoreDamaged(f"{path} is not JSON: {error}. Restore it from a backup or remove it.") from error
    if not isinstance(value, dict):
        raise StoreDamaged(f"{path} does not hold a JSON object. Restore it from a backup or remove it.")
    return value


def move_file(source: Path, target: Path) -> None:
    """Renames a synced file over `target`; the name is on disk when this returns."""
    os.replace(source, target)
    sync_directory(target.parent)


def remove(path: Path) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def raise_if_full(error: OSError) -> None:
    """Turns "no space" and "over quota" into DiskFull; leaves every other error to the caller."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFull("the disk is full; nothing was kept. Free some space and try again.") from error
