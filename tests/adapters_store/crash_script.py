"""Runs one scenario on a store and dies, as by kill -9, at the n-th change of the disk. Run by the crash tests.

    python -m tests.adapters_store.crash_script STORE SCENARIO POINT BEFORE|AFTER

Prints how many points the scenario has when it ends alive.
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

POINTS = ("replace", "fsync", "unlink", "mkdir", "open")


def plant(fatal_point: int, after: bool) -> Callable[[], int]:
    """Makes the process die before or after the `fatal_point`-th call; the result counts calls."""
    num_calls = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == fatal_point and not after:
                os._exit(9)
            result = real(*arguments, **options)
            if num_calls == fatal_point and after:
                os._exit(9)
            return result

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


def main() -> None:
    store, scenario, point, side = sys.argv[1:]
    catalog = Catalog(Path(store), BASE)
    count = plant(int(point), side == "AFTER")
    SCENARIOS[scenario](catalog)
    print(count())


if __name__ == "__main__":
    main()
