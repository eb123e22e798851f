"""Directories as a source: below the allowed roots, and by no trick anywhere else."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from adapters_store.errors import FileRefused
from server.library.errors import SourceError, SourceForbidden, SourceNotFound, SourceUnavailable
from server.library.sources.listing import SourceFile
from server.library.sources.local import LocalSource
from server.library.sources.policy import SourcePolicy
from tests.library.source_samples import KEPT, Place, adapter_files, open_place


def write(directory: Path, files: dict[str, bytes] | None = None) -> Path:
    directory.mkdir(parents=True)
    for name, content in (files or adapter_files()).items():
        (directory / name).write_bytes(content)
    return directory


def pull(tmp_path: Path, uri: str, *roots: Path) -> list[str]:
    """The files of the version that it became; nothing may be left of a failure."""

    async def inside() -> list[str]:
        async with open_place(tmp_path / "store", SourcePolicy(roots=roots)) as place:
            try:
                committed = await place.puller.pull(uri, "sql")
            except Exception:
                assert place.is_untouched()
                raise
            return [file.path for file in committed.version.files]

    return asyncio.run(inside())


def test_a_directory_below_a_root(tmp_path: Path) -> None:
    here = write(tmp_path / "adapters" / "team" / "sql")
    assert pull(tmp_path, str(here), tmp_path / "adapters") == KEPT
    assert pull(tmp_path, here.as_uri(), tmp_path / "other", tmp_path / "adapters") == KEPT


def test_a_root_and_a_file_may_be_links_as_long_as_they_end_below_a_root(tmp_path: Path) -> None:
    blobs = write(tmp_path / "adapters" / "blobs")
    snapshot = tmp_path / "adapters" / "snapshot"
    snapshot.mkdir()
    for name in KEPT:
        (snapshot / name).symlink_to(blobs / name)
    (tmp_path / "link").symlink_to(tmp_path / "adapters")
    assert pull(tmp_path, str(tmp_path / "link" / "snapshot"), tmp_path / "link") == KEPT


def test_outside_of_the_roots_nothing_is_told(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside")
    (tmp_path / "adapters").mkdir()
    told = set()
    for path in (outside, tmp_path / "nothing", tmp_path / "adapters-too"):
        with pytest.raises(SourceForbidden) as caught:
            pull(tmp_path, str(path), tmp_path / "adapters")
        told.add(str(caught.value).replace(str(path), "PATH"))
    assert len(told) == 1
    with pytest.raises(SourceForbidden):  # no roots at all: the default
        pull(tmp_path, str(outside))


def test_links_that_lead_outside_are_not_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside")
    inside = write(tmp_path / "adapters" / "sql")
    (tmp_path / "adapters" / "way-out").symlink_to(outside)
    with pytest.raises(SourceForbidden):
        pull(tmp_path, str(tmp_path / "adapters" / "way-out"), tmp_path / "adapters")
    (inside / KEPT[1]).unlink()
    (inside / KEPT[1]).symlink_to(outside / KEPT[1])
    with pytest.raises(SourceForbidden):
        pull(tmp_path, str(inside), tmp_path / "adapters")


def test_what_is_no_plain_file_is_not_read(tmp_path: Path) -> None:
    here = write(tmp_path / "adapters" / "sql")
    source = LocalSource(str(here), (tmp_path / "adapters",))
    os.mkfifo(here / "pipe")
    with pytest.raises(SourceForbidden, match="no plain file"):
        list(source.read(SourceFile("pipe", str(here / "pipe"))))
    with pytest.raises(SourceUnavailable):
        list(source.read(SourceFile("gone", str(here / "gone"))))


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"README.md": b""}, SourceNotFound),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b""}, FileRefused),
        ({"adapter_config.json": b"{}"}, SourceNotFound),
    ],
)
def test_what_is_no_adapter(tmp_path: Path, files: dict[str, bytes], kind: type[Exception]) -> None:
    here = write(tmp_path / "adapters" / "sql", files)
    with pytest.raises(kind):
        pull(tmp_path, str(here), tmp_path / "adapters")


def test_a_path_takes_no_token(tmp_path: Path) -> None:
    async def test(place: Place) -> None:
        with pytest.raises(SourceError, match="takes no token"):
            await place.puller.pull(str(tmp_path), "sql", token="hf_x")

    async def inside() -> None:
        async with open_place(tmp_path / "store", SourcePolicy(roots=(tmp_path,))) as place:
            await test(place)

    asyncio.run(inside())
