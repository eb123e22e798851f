"""Takes a store, or one adapter of it, elsewhere: one file that holds everything, or a plain PEFT directory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from adapters_store.names import Reference


class BackedUp(NamedTuple):
    num_adapters: int
    num_versions: int
    num_bytes: int  # of the archive


def backup(root: Path, archive: Path) -> BackedUp:
    """Writes the committed state of one moment to a tar file, whole or not at all; servers go on meanwhile.

    Raises:
        StoreUnusable: there is no store in `root`.
        FileExistsError: `archive` is there.
        DiskFull.
    """
    raise NotImplementedError


def restore(archive: Path, root: Path) -> BackedUp:
    """Makes a store in `root`, which must be empty or not there, from what `backup` wrote. Every digest is checked.

    Raises:
        StoreDamaged: the archive is cut, changed or none of ours; nothing is left in `root`.
        StoreUnusable: `root` is not empty.
        DiskFull.
    """
    raise NotImplementedError


def export(root: Path, reference: Reference, directory: Path) -> int:
    """Copies one version's files to a new directory that PEFT and every other server reads; returns its number.

    Raises:
        AdapterNotFound, AliasNotFound, VersionNotFound.
        FileExistsError: `directory` is there.
        StoreDamaged: a file's digest is not what was committed.
    """
    raise NotImplementedError
