from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.errors import DigestMismatch, DiskFull, FileRefused, TooLarge
from adapters_store.staging import Stage, StageLimits, check_path
from tests.adapters_store.store_samples import CONFIG, weights


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "stage", StageLimits(max_file_bytes=1000, max_total_bytes=1500, max_files=3))


def test_a_file_arrives_in_pieces_counted_and_hashed(stage: Stage) -> None:
    file = stage.add_file("adapter_config.json", [CONFIG[:5], b"", CONFIG[5:]])
    assert file.size == len(CONFIG)
    assert file.sha256 == hashlib.sha256(CONFIG).hexdigest()
    assert stage.path_of("adapter_config.json").read_bytes() == CONFIG


def test_the_manifest_does_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    files = {"adapter_config.json": CONFIG, "adapter_model.safetensors": weights()}
    digests = set()
    for number, names in enumerate((sorted(files), sorted(files, reverse=True))):
        stage = Stage(tmp_path / str(number), StageLimits())
        for name in names:
            stage.add_file(name, [files[name]])
        digests.add(stage.manifest_digest)
    other = Stage(tmp_path / "other", StageLimits())
    other.add_file("adapter_config.json", [CONFIG])
    assert len(digests) == 1
    assert other.manifest_digest not in digests


@pytest.mark.parametrize(
    "path",
    ["../adapter_config.json", "/adapter_config.json", "a/adapter_config.json", "a\\adapter_config.json", "", ".", "..",
     "tokenizer/../x.json", "tokenizer\n.json", "tokenizer\0.json", "setup.py", "adapter_config.json/",
     "Adapter_Config.json", "tokenizeré.json", f"tokenizer{100 * 'x'}.json",
     ".adapter_config.json", "adapter_config.json.tmp"],
)  # fmt: skip
def test_a_path_that_climbs_or_is_not_an_adapters_is_refused(stage: Stage, path: str) -> None:
    with pytest.raises(FileRefused, match="no file of an adapter"):
        stage.add_file(path, [b"x"])
    assert list(stage.directory.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "x.pkl", "../adapter_model.bin"]
)
def test_a_pickle_is_refused_with_the_way_out(stage: Stage, path: str) -> None:
    with pytest.raises(FileRefused, match="safe_serialization=True"):
        stage.add_file(path, [b"x"])


@given(st.text(max_size=30))
def test_any_path_that_is_taken_is_a_plain_file_name(path: str) -> None:
    try:
        check_path(path)
    except FileRefused:
        return
    assert Path(path).name == path


def test_a_file_sent_twice_is_refused(stage: Stage) -> None:
    stage.add_file("README.md", [b"one"])
    with pytest.raises(FileRefused, match="twice"):
        stage.add_file("README.md", [b"two"])


def test_a_file_over_its_cap_is_refused_and_its_bytes_are_gone(stage: Stage) -> None:
    with pytest.raises(TooLarge, match="1000 bytes for one such file"):
        stage.add_file("README.md", [b"x" * 600, b"x" * 600])
    assert list(stage.directory.iterdir()) == []
    stage.add_file("README.md", [b"x" * 1000])  # exactly the cap fits, and the refused bytes do not count
    stage.add_file("chat_template.jinja", [b"x" * 500])
    with pytest.raises(TooLarge, match="together"):
        stage.add_file("tokenizer.json", [b"x"])


def test_a_file_announced_over_its_cap_is_refused_before_its_first_byte(stage: Stage) -> None:
    with pytest.raises(TooLarge):
        stage.open_file("README.md", num_bytes=1001)
    assert list(stage.directory.iterdir()) == []


def test_too_many_files_are_refused(stage: Stage) -> None:
    for name in ("README.md", "tokenizer.json", "chat_template.jinja"):
        stage.add_file(name, [b"x"])
    with pytest.raises(TooLarge, match="more than 3 files"):
        stage.add_file("adapter_config.json", [b"x"])


def test_bytes_that_are_not_the_announced_ones_are_refused(stage: Stage) -> None:
    with pytest.raises(DigestMismatch):
        stage.add_file("README.md", [b"hello"], sha256="0" * 64)
    assert stage.files == ()
    good = hashlib.sha256(b"hello").hexdigest()
    assert stage.add_file("README.md", [b"hello"], sha256=good.upper()).sha256 == good


def test_a_sender_that_vanishes_leaves_nothing(stage: Stage) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"hel"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        stage.add_file("README.md", chunks())
    assert stage.files == ()
    assert list(stage.directory.iterdir()) == []


def test_closing_removes_files_complete_or_not(stage: Stage) -> None:
    stage.add_file("README.md", [b"x"])
    stage.open_file("tokenizer.json").write(b"half")
    stage.close()
    stage.close()
    assert not stage.directory.exists()


def test_a_stage_that_was_taken_over_is_closed_by_its_new_owner_only(stage: Stage) -> None:
    stage.add_file("README.md", [b"x"])
    owner = stage.take_over()
    stage.close()
    assert owner.path_of("README.md").read_bytes() == b"x"
    owner.close()
    assert not stage.directory.exists()


def test_a_disk_without_room_is_told_before_the_bytes_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path / "stage", StageLimits(reserve_bytes=100))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    stage.open_file("README.md", num_bytes=900).abandon()
    with pytest.raises(DiskFull, match="1000 bytes are free"):
        stage.open_file("README.md", num_bytes=901)


def test_a_disk_that_fills_up_is_told_and_nothing_stays(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match="nothing was kept"):
            stage.add_file("README.md", [b"x"])
    assert list(stage.directory.iterdir()) == []
    assert stage.add_file("README.md", [b"x"]).size == 1
