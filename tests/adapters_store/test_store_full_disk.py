"""A store on a disk that is really full: a small file system in memory. Skipped where mounting is not allowed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store import fsck
from adapters_store.backup import backup, export
from adapters_store.catalog import Catalog
from adapters_store.errors import DiskFull
from adapters_store.images import StagedImage
from adapters_store.names import parse_reference
from adapters_store.record import Source
from adapters_store.staging import StageLimits
from tests.adapters_store.store_samples import BASE, commit, content, safetensors_bytes

NUM_BYTES = 2 * 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={NUM_BYTES}", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def upload(catalog: Catalog, data: bytes, image_bytes: int = 0) -> None:
    with catalog.stage() as stage:
        stage.add_file("adapter_config.json", [b"{}"])
        stage.add_file("adapter_model.safetensors", [safetensors_bytes({"a": ("U8", [len(data)], data)})])
        path = stage.directory / "image"
        image = StagedImage(path, "f32", image_bytes)
        if image_bytes:
            path.write_bytes(bytes(image_bytes))
        catalog.commit(stage, "big", content("big"), Source("upload:"), image=image if image_bytes else None)


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_refuses_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    store = small_disk / "store"
    catalog = Catalog(store, BASE, limits=StageLimits(reserve_bytes=0))
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 2)
    with pytest.raises(DiskFull):
        upload(catalog, bytes(NUM_BYTES))
    assert list((store / "staging").iterdir()) == []
    upload(catalog, bytes(1000))  # the control: what fits is taken
    filler = small_disk / "filler"
    filler.touch()
    with pytest.raises(OSError, match="No space"):
        fill_up(filler)
    assert list((store / "staging").iterdir()) == []
    careful = Catalog(store, BASE)
    with pytest.raises(DiskFull, match="stay in reserve"):
        careful.stage()
    careful.close()
    assert list((store / "staging").iterdir()) == []
    before = catalog.page().records
    for change in (
        lambda: commit(catalog, "sql", 3),
        lambda: commit(catalog, "new", 4),
        lambda: catalog.aliases.set("sql", "prod", 1),
        lambda: catalog.aliases.weigh("sql", "default", {1: 1, 2: 1}),
        lambda: catalog.amend("sql", lambda said: replace(said, pinned=True)),
        lambda: catalog.delete("sql", 1),  # the reserve is there so that this can be done before
        lambda: backup(store, small_disk / "store.tar"),
        lambda: export(store, parse_reference("sql"), small_disk / "out"),
    ):
        with pytest.raises(DiskFull):
            change()
        assert catalog.page().records == before
    catalog.close()
    again = Catalog(store, BASE, limits=StageLimits(reserve_bytes=0))  # a full disk opens, too
    assert again.page().records == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "store"]
    filler.unlink()
    commit(again, "sql", 3)
    assert again.look_up(parse_reference("sql")).version == 3
    again.delete("big")
    again.close()
    assert fsck.check(store).findings == ()
