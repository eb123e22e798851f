"""Directories that are no store, or not one that this program can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import StoreDamaged, StoreUnusable
from adapters_store.layout import check_store
from tests.adapters_store.store_samples import BASE


def test_a_place_that_can_hold_no_store_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreUnusable, match="cannot be used as an adapter store"):
            check_store(place)
    check_store(tmp_path / "new" / "store")
    check_store(tmp_path / "new" / "store")  # nobody holds it


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreDamaged, match="not empty"):
        Catalog(tmp_path, BASE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_store_of_a_newer_program_is_refused(catalog: Catalog, store: Path) -> None:
    catalog.close()
    (store / "store.json").write_text('{"schema": 99}')
    for _ in range(2):  # the refusal lets go of the lock
        with pytest.raises(StoreDamaged, match="schema 99"):
            Catalog(store, BASE)
