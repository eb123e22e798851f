"""Stores of schema 1 are brought to schema 2, wherever a crash cuts that short; newer ones are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import StoreDamaged
from adapters_store.names import parse_reference
from adapters_store.schema import SCHEMA
from tests.adapters_store.store_samples import BASE, commit


def make_old(store: Path) -> None:
    """A store as the release before left it."""
    catalog = Catalog(store, BASE)
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 2)
    commit(catalog, "org/sql", 3, aliases=("default", "prod"))
    catalog.close()
    for path in (store / "aliases").glob("*/*.json"):
        number = int(next(iter(json.loads(path.read_bytes())["weights"])))
        path.write_text(json.dumps({"version": number, "previous": 1 if number == 2 else None}))
    (store / "store.json").write_text('{"schema": 1}')
    for part in ("attributes", "changes"):
        shutil.rmtree(store / part)
    (store / "locks").unlink()


def check_new(store: Path) -> None:
    catalog = Catalog(store, BASE)
    assert json.loads((store / "store.json").read_bytes()) == {"schema": SCHEMA}
    assert catalog.look_up(parse_reference("sql")).version == 2
    assert catalog.look_up(parse_reference("org/sql@prod")).version == 1
    assert catalog.aliases.roll_back("sql").weights == {1: 1}
    catalog.close()


def test_an_older_store_is_migrated_when_it_is_opened(store: Path) -> None:
    make_old(store)
    check_new(store)


def test_a_migration_that_was_cut_short_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(Exception):
        pass

    make_old(tmp_path / "origin")
    real = os.replace
    num_cuts = 0
    for fatal_call in range(1, 20):
        store = tmp_path / str(fatal_call)
        shutil.copytree(tmp_path / "origin", store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _cutting(real, fatal_call, Cut))
            try:
                Catalog(store, BASE).close()
            except Cut:
                num_cuts += 1
        check_new(store)
    assert num_cuts == 4  # three aliases and the marker


def _cutting(real: Callable[..., Any], fatal_call: int, error: type[Exception]) -> Callable[..., Any]:
    calls = 0

    def replace(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fatal_call:
            raise error
        real(*arguments)

    return replace


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "2", None])
def test_a_store_of_an_unknown_schema_is_refused_and_left_alone(catalog: Catalog, store: Path, schema: object) -> None:
    commit(catalog, "sql", 1)
    catalog.close()
    (store / "store.json").write_text(json.dumps({"schema": schema}))
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    with pytest.raises(StoreDamaged, match="Use the program that wrote it"):
        Catalog(store, BASE)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
