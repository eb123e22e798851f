"""Packed images: found, bounded, swept by age, never under someone who may read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapters_store.attributes import Attributes
from adapters_store.catalog import Catalog
from adapters_store.images import ImageShelf, StagedImage
from adapters_store.names import parse_reference
from tests.adapters_store.store_samples import BASE, commit

VARIANT = "base-float32"
SIZE = 1000


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "store", BASE)


def shelve(catalog: Catalog, name: str, fill: int, *, age_s: int = 0) -> Path:
    """Commits an adapter with an image of `SIZE` bytes, last used so long ago."""
    version = commit(catalog, name, fill).version
    source = catalog.root / "staging" / f"{name}.packed"
    source.write_bytes(bytes([fill]) * SIZE)
    image = catalog.keep_image(version, StagedImage(source, VARIANT, SIZE - 10))
    if age_s:
        past = image.path.stat().st_mtime - age_s
        os.utime(image.path, (past, past))
    return image.path


def left(*paths: Path) -> list[bool]:
    return [path.exists() for path in paths]


def test_within_the_bound_nothing_goes(catalog: Catalog) -> None:
    path = shelve(catalog, "a", 1)
    assert catalog.shelf.num_bytes == SIZE
    assert catalog.upkeep.sweep_images(SIZE) == 0
    assert left(path) == [True]


def test_those_unused_longest_go_until_there_is_some_room(catalog: Catalog) -> None:
    ages_s = {"a": 900, "b": 10, "c": 500}
    paths = [shelve(catalog, name, fill, age_s=age_s) for fill, (name, age_s) in enumerate(ages_s.items())]
    assert catalog.upkeep.sweep_images(2 * SIZE) == 2 * SIZE, "down to nine tenths of the bound"
    assert left(*paths) == [False, True, False]
    assert catalog.shelf.num_bytes == SIZE
    assert catalog.find_image(catalog.look_up(parse_reference("a")), VARIANT) is None
    assert catalog.find_image(catalog.look_up(parse_reference("b")), VARIANT) is not None
    assert sorted(path.suffix for path in (catalog.root / "images").iterdir()) == [".img", ".json"], "sidecars go too"


def test_to_be_asked_for_is_to_be_used(catalog: Catalog) -> None:
    paths = [shelve(catalog, "a", 1, age_s=900), shelve(catalog, "b", 2, age_s=500)]
    fresh = ImageShelf(catalog.root / "images")
    assert fresh.find(catalog.look_up(parse_reference("a")).content.effect_digest, VARIANT) is not None
    catalog.upkeep.sweep_images(int(1.5 * SIZE))
    assert left(*paths) == [True, False]


def test_what_is_held_here_or_in_another_process_stays(catalog: Catalog) -> None:
    paths = [shelve(catalog, "a", 1, age_s=900), shelve(catalog, "b", 2, age_s=800), shelve(catalog, "c", 3)]
    other = Catalog(catalog.root, BASE)
    with catalog.lease(parse_reference("a")), other.lease(parse_reference("b")):
        assert catalog.upkeep.sweep_images(0) == SIZE
        assert left(*paths) == [True, True, False]
    assert catalog.upkeep.sweep_images(0) == 2 * SIZE, "the control: let go, they go"
    other.close()


def test_an_image_that_two_names_share_stays_while_one_is_held(catalog: Catalog) -> None:
    path = shelve(catalog, "a", 1)
    commit(catalog, "b", 1)
    with catalog.lease(parse_reference("b")):
        assert catalog.upkeep.sweep_images(0) == 0
    assert left(path) == [True]


def test_the_image_of_a_pinned_adapter_stays(catalog: Catalog) -> None:
    path = shelve(catalog, "a", 1)
    catalog.amend("a", lambda found: Attributes(pinned=True))
    assert catalog.upkeep.sweep_images(0) == 0
    assert left(path) == [True]


def test_what_goes_with_its_adapter_is_not_counted_any_more(catalog: Catalog) -> None:
    shelve(catalog, "a", 1)
    shelve(catalog, "b", 2)
    catalog.delete("a")
    assert catalog.shelf.num_bytes == SIZE
    (catalog.root / "images" / f"{'0' * 64}-older.img").write_bytes(bytes(SIZE))
    catalog.shelf.survey()
    assert catalog.shelf.num_bytes == 2 * SIZE
    catalog.upkeep.collect()
    assert catalog.shelf.num_bytes == SIZE


def test_images_of_other_bases_and_packers_go_by_their_age(catalog: Catalog) -> None:
    stray = catalog.root / "images" / f"{'0' * 64}-older.img"
    path = shelve(catalog, "a", 1)
    stray.write_bytes(bytes(SIZE))
    os.utime(stray, (1.0, 1.0))
    assert catalog.upkeep.sweep_images(int(1.5 * SIZE)) == SIZE
    assert left(stray, path) == [False, True]
