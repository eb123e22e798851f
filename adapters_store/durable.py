"""The few ways in which this package changes a disk, each complete or without effect.

    write_file   new bytes under a temporary name -> fsync -> rename -> fsync of the directory
    move_file    an already synced file gets its final name -> fsync of the directory
    remove       gone for good; what was gone already is no error

After a crash a name therefore holds either the old bytes or the new ones, whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_store.errors import DiskFull, StoreDamaged

TEMPORARY_SUFFIX = ".tmp"


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
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise_if_full(error)
        raise
    move_file(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


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
