"""The schema of a store: which one this program reads and writes, and how an older store is brought there.

A store of an older schema is migrated when it is opened, under the lock of changes, in steps that may be cut short and
run again; `store.json` is raised last. A store of a newer schema is refused: no program writes to what it does not
wholly know. The way back to an older release is therefore a backup that it made, or `export`, whose directories every
release reads.

    1   an alias means one version and remembers one more; one process at a time
    2   aliases have weights and a history, adapters have attributes; processes share a store
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapters_store.alias import Alias, AliasMove
from adapters_store.durable import read_json, write_json
from adapters_store.errors import StoreDamaged
from adapters_store.locks import CHANGE, StoreLocks

SCHEMA = 2
MARKER = "store.json"

_TIMEOUT_S = 60.0


def settle_schema(root: Path, locks_path: Path) -> None:
    """Marks a new store, migrates an older one. Raises StoreDamaged for a newer one, StoreBusy."""
    marker = root / MARKER
    if marker.exists() and _found(root) == SCHEMA:
        return
    locks = StoreLocks(locks_path)
    try:
        with locks.alone(CHANGE, _TIMEOUT_S):
            if not marker.exists():
                write_json(marker, {"schema": SCHEMA})
            for schema in range(_found(root), SCHEMA):  # another process may have done it meanwhile
                _MIGRATIONS[schema](root)
                write_json(marker, {"schema": schema + 1})
    finally:
        locks.close()


def _found(root: Path) -> int:
    found = read_json(root / MARKER).get("schema")
    if not isinstance(found, int) or not 1 <= found <= SCHEMA:
        raise StoreDamaged(
            f"{root} has schema {found!r}; this program reads schema {SCHEMA} and older ones. Use the program that "
            "wrote it, or another directory; `veneer adapters export` of that program makes directories that this one "
            "takes."
        )
    return found


def _give_aliases_weights(root: Path) -> None:
    for path in sorted((root / "aliases").glob("*/*.json")):
        before = read_json(path)
        if "weights" in before:
            continue  # done, and then cut short
        previous = before.get("previous")
        history = (AliasMove({previous: 1}, ""),) if isinstance(previous, int) else ()
        write_json(path, Alias({int(before["version"]): 1}, history).to_json())


_MIGRATIONS: dict[int, Callable[[Path], None]] = {1: _give_aliases_weights}
