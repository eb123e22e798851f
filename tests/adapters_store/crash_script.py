"""Runs one scenario on several stores and dies, as by kill -9, at the n-th change of the disk. Run by the crash tests.

    python -m tests.adapters_store.crash_script SCENARIO STORE:POINT:BEFORE|AFTER ...

Prints a line per store: the exit status of the process that worked on it (9: killed) and the names of the changes that
it lived to make, "-" when it died.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters_store.attributes import Attributes
from adapters_store.catalog import Catalog
from adapters_store.images import StagedImage
from tests.adapters_store.store_samples import BASE, commit

POINTS = ("replace", "link", "fsync", "unlink", "mkdir", "open", "write")


def plant(fatal_point: int, after: bool) -> list[str]:
    """Makes the process die before or after the `fatal_point`-th call; the list grows by the name of every call."""
    calls: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            num_calls = len(calls)
            if num_calls == fatal_point and not after:
                os._exit(9)
            try:
                return real(*arguments, **options)
            finally:
                if num_calls == fatal_point and after:
                    os._exit(9)

        return call

    for name in POINTS:
        setattr(os, name, wrap(name, getattr(os, name)))
    return calls


def upload(catalog: Catalog) -> None:
    path = catalog.stage().directory / "image"
    path.write_bytes(b"image")
    commit(catalog, "sql", 2, aliases=("default", "prod"), image=StagedImage(path, "f32", 5))


def label(said: Attributes) -> Attributes:
    return replace(said, labels={"team": "bi"}, pinned_versions=frozenset({6}))


SCENARIOS: dict[str, Callable[[Catalog], object]] = {
    "upload": upload,
    "alias": lambda catalog: catalog.aliases.set("sql", "default", 7),
    "weigh": lambda catalog: catalog.aliases.weigh("sql", "default", {6: 9, 7: 1}),
    "roll-back": lambda catalog: catalog.aliases.roll_back("sql", "canary"),
    "remove-alias": lambda catalog: catalog.aliases.remove("sql", "canary"),
    "amend": lambda catalog: catalog.amend("sql", label),
    "force-version": lambda catalog: catalog.delete("sql", 6, force=True),
    "delete-version": lambda catalog: catalog.delete("sql", 7),
    "delete-adapter": lambda catalog: catalog.delete("sql"),
}


def work(scenario: str, store: str, point: int, side: str) -> list[str]:
    """The changes that the scenario makes, unless this process dies on the way."""
    catalog = Catalog(Path(store), BASE)
    calls = plant(point, side == "AFTER")
    SCENARIOS[scenario](catalog)
    return list(calls)


def run_in_child(scenario: str, store: str, point: int, side: str) -> tuple[int, str]:
    """(exit status, names of the changes). A fork is cheap here: this program has one thread and little memory."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        write = os.write
        changes = work(scenario, store, point, side)
        write(writing, ",".join(changes).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), told or "-"


def main() -> None:
    scenario, *jobs = sys.argv[1:]
    for job in jobs:
        store, point, side = job.rsplit(":", 2)
        print(*run_in_child(scenario, store, int(point), side))


if __name__ == "__main__":
    main()
