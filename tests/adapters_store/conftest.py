"""A store that is closed when the test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.catalog import Catalog
from tests.adapters_store.store_samples import BASE


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def catalog(store: Path) -> Iterator[Catalog]:
    catalog = Catalog(store, BASE)
    yield catalog
    catalog.close()
