"""`veneer adapters fsck|backup|restore|export`: a store's directory, with or without servers on it.

    veneer adapters fsck --store-dir ./store --repair
    veneer adapters backup store.tar --store-dir ./store
    veneer adapters restore store.tar ./new-store
    veneer adapters export sql@3 ./sql --store-dir ./store

Exit codes: 0 done and sound, 1 something is wrong with the store or the archive, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from adapters_store.audit_log import AuditEntry, AuditLog
from adapters_store.backup import backup, export, restore
from adapters_store.errors import InvalidName, StoreError
from adapters_store.fsck import check
from adapters_store.names import parse_reference
from server.cli_server import SAID_NO, WRONG_USAGE, AsJson

_Store = Annotated[
    Path, typer.Option("--store-dir", envvar="VENEER_STORE_DIR", file_okay=False, exists=True, help="The store.")
]
_Archive = Annotated[Path, typer.Argument(metavar="ARCHIVE", dir_okay=False)]
_Answer = TypeVar("_Answer")
_MAX_TOLD = 100  # subjects in one line of the audit log


def register(app: typer.Typer) -> None:
    """Adds the commands to `veneer adapters`."""
    app.command("fsck")(check_store)
    app.command("backup")(back_up)
    app.command("restore")(bring_back)
    app.command("export")(export_adapter)


def check_store(
    store: _Store,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what can be.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Look at sizes only, and hash nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read a whole store and say what is wrong with it. Servers may run on it."""
    found = _do(lambda: check(store, repair=repair, read_bytes=not quick))
    repaired = [finding.subject for finding in found.findings if finding.repaired]
    if repaired:
        _note(store, "fsck", "store.repair", repaired=repaired[:_MAX_TOLD], number=len(repaired))
    if as_json:
        findings = [finding.to_json() for finding in found.findings]
        counts = {"adapters": found.num_adapters, "versions": found.num_versions, "bytes": found.num_bytes}
        print(json.dumps({"sound": found.is_sound, **counts, "findings": findings}))
    else:
        for finding in found.findings:
            print(f"{'repaired' if finding.repaired else finding.code}: {finding.subject}: {finding.message}")
        sound = "sound" if found.is_sound else "NOT sound"
        print(f"{found.num_adapters} adapters, {found.num_versions} versions, {found.num_bytes:,} bytes: {sound}")
    if not found.is_sound:
        raise typer.Exit(SAID_NO)


def back_up(archive: _Archive, store: _Store) -> None:
    """Write everything that is committed to a tar file. Servers may run on the store."""
    done = _do(lambda: backup(store, archive))
    print(f"{archive}: {done.num_adapters} adapters, {done.num_versions} versions, {done.num_bytes:,} bytes")


def bring_back(archive: _Archive, directory: Annotated[Path, typer.Argument(metavar="DIRECTORY")]) -> None:
    """Make a new store from a backup; every digest is checked before it counts."""
    done = _do(lambda: restore(archive, directory))
    _note(directory, "restore", "store.restore", archive=archive.name, adapters=done.num_adapters)
    print(f"{directory}: {done.num_adapters} adapters, {done.num_versions} versions")


def export_adapter(
    reference: Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]")],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY")],
    store: _Store,
) -> None:
    """Copy one version to a new directory, as PEFT reads it."""
    number = _do(lambda: export(store, parse_reference(reference), directory))
    print(f"{directory}: version {number} of {reference.partition('@')[0]}")


def _note(store: Path, actor: str, action: str, **detail: Any) -> None:
    AuditLog(store).note(AuditEntry(actor, action, "", detail))


def _do(job: Callable[[], _Answer]) -> _Answer:
    try:
        return job()
    except (StoreError, OSError) as error:
        print(f"veneer: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_USAGE if isinstance(error, InvalidName) else SAID_NO) from None
