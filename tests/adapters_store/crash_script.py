"""Runs one scenario on several stores and dies, as by kill -9, at the n-th change of the disk. Run by the crash tests.

    python -m tests.adapters_store.crash_script SCENARIO STORE:POINT:BEFORE|AFTER ...

Prints a line per store: the exit status of the process that worked on it (9: killed) and the number of changes that it
lived to make, -1 when it died.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters_store.catalog import Catalog
from adapters_store.images import StagedImage
from tests.adapters_store.store_samples import BASE, commit

POINTS = ("replace", "link", "fsync", "unlink", "mkdir", "open", "write")


def plant(fatal_point: int, after: bool) -> Callable[[], int]:
    """Makes the process die before or after the `fatal_point`-th call; the result counts calls."""
    num_calls = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == fatal_point and not after:
                os._exit(9)
            try:
                return real(*arguments, **options)
            finally:
                if num_calls == fatal_point and after:
                    os._exit(9)

        return call

    for name in POINTS:
        setattr(os, name, wrap(getattr(os, name)))
    return lambda: num_calls


def upload(catalog: Catalog) -> None:
    path = catalog.stage().directory / "image"
    path.write_bytes(b"image")
    commit(catalog, "sql", 2, aliases=("default", "prod"), image=StagedImage(path, "f32", 5))


SCENARIOS: dict[str, Callable[[Catalog], object]] = {
    "upload": upload,
    "alias": lambda catalog: catalog.set_alias("sql", "default", 7),
    "delete-version": lambda catalog: catalog.delete("sql", 7),
    "delete-adapter": lambda catalog: catalog.delete("sql"),
}


def work(scenario: str, store: str, point: int, side: str) -> int:
    """The number of changes that the scenario makes, unless this process dies on the way."""
    catalog = Catalog(Path(store), BASE)
    count = plant(point, side == "AFTER")
    SCENARIOS[scenario](catalog)
    return count()


def run_in_child(scenario: str, store: str, point: int, side: str) -> tuple[int, int]:
    """(exit status, number of changes). A fork is cheap here: this program has one thread and little memory."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        write = os.write
        num_changes = work(scenario, store, point, side)
        write(writing, str(num_changes).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(told or -1)


def main() -> None:
    scenario, *jobs = sys.argv[1:]
    for job in jobs:
        store, point, side = job.rsplit(":", 2)
        print(*run_in_child(scenario, store, int(point), side))


if __name__ == "__main__":
    main()
