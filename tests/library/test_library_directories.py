from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adapters_store.errors import FileRefused, PreconditionFailed
from adapters_store.record import VersionState
from server.api.preconditions import Precondition
from server.library.directory import AdapterDirectory
from server.library.errors import AdapterUnusable, NotADirectory
from tests.library.library_samples import in_a_loop, make_files, make_target, open_library, upload, write_files


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """Two good adapters, one of them two levels deep, and things that are none."""
    root = tmp_path / "adapters"
    write_files(root / "sql", make_files(1) | {"training_args.bin": b"\x80pickle", "optimizer.pt": b"x"})
    write_files(root / "org" / "poet", make_files(2))
    write_files(root / ".git", make_files(3))
    (root / "notes").mkdir()
    (root / "README.md").write_text("hello")
    return root


@in_a_loop
async def test_every_adapter_below_the_directory_is_registered(tmp_path: Path, adapters: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    async with open_library(tmp_path / "store") as (library, _):
        result = await library.discover(adapters, lambda *progress: seen.append(progress))
        assert result == (["org/poet", "sql"], [], {})
        assert seen == [(1, 2, "org/poet"), (2, 2, "sql")]
        (await library.resolve("org/poet")).release()
        files = {file.path for file in library.look_up("sql").files}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}


@in_a_loop
async def test_a_restart_adds_nothing_and_reads_nothing(
    tmp_path: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_library(tmp_path / "store") as (library, _):
        await library.discover(adapters)
    monkeypatch.delattr(AdapterDirectory, "copy_into")
    async with open_library(tmp_path / "store") as (library, loader):
        assert (await library.discover(adapters)).unchanged == ["org/poet", "sql"]
        assert loader.num_jobs == 0


@in_a_loop
async def test_touched_files_of_the_same_content_add_nothing(tmp_path: Path, adapters: Path) -> None:
    async with open_library(tmp_path / "store") as (library, loader):
        await library.discover(adapters)
        os.utime(adapters / "sql" / "adapter_config.json", (1, 1))
        assert (await library.discover(adapters)).unchanged == ["org/poet", "sql"]
        assert loader.num_jobs == 2
        assert list((tmp_path / "store" / "staging").iterdir()) == []


@in_a_loop
async def test_changed_files_are_a_new_version_and_going_back_goes_back(tmp_path: Path, adapters: Path) -> None:
    async with open_library(tmp_path / "store") as (library, _):
        await library.discover(adapters)
        write_files(adapters / "sql", make_files(7))
        assert (await library.discover(adapters)).added == ["sql"]
        assert library.look_up("sql").version == 2
        write_files(adapters / "sql", make_files(1))
        assert (await library.discover(adapters)).added == []
        assert library.look_up("sql").version == 1
        assert len((await library.show("sql")).versions) == 2


@in_a_loop
async def test_an_alias_moved_by_hand_survives_a_restart(tmp_path: Path, adapters: Path) -> None:
    async with open_library(tmp_path / "store") as (library, _):
        await library.discover(adapters)
        await upload(library, "sql", make_files(9))
        assert library.look_up("sql").version == 2
    async with open_library(tmp_path / "store") as (library, _):
        await library.discover(adapters)
        assert library.look_up("sql").version == 2


@in_a_loop
async def test_bad_directories_are_listed_as_failed_and_stop_nothing(tmp_path: Path, adapters: Path) -> None:
    write_files(adapters / "broken", make_files(1) | {"adapter_model.safetensors": b"short"})
    write_files(adapters / "dora", make_files(1, init_lora_weights="lora_ga"))
    write_files(adapters / "no-weights", {"adapter_config.json": b"{}"})
    write_files(adapters / "pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"})
    write_files(adapters / "bad name", make_files(1))
    async with open_library(tmp_path / "store") as (library, _):
        result = await library.discover(adapters)
        assert result.added == ["org/poet", "sql"]
        assert sorted(result.failed) == ["bad name", "broken", "dora", "no-weights", "pickled"]
        assert "init_lora_weights" in result.failed["dora"]
        assert "safe_serialization" in result.failed["pickled"]
        records = {record.name: record for record in library.page().records}
        assert (records["dora"].state, records["dora"].reason) == (VersionState.FAILED, result.failed["dora"])
        assert records["sql"].state is VersionState.READY
        with pytest.raises(AdapterUnusable, match="init_lora_weights"):
            await library.resolve("dora")
        assert list((tmp_path / "store" / "staging").iterdir()) == []
        write_files(adapters / "dora", make_files(4))
        assert (await library.discover(adapters)).added == ["dora"]
        assert (await library.show("dora")).state is VersionState.READY
        with pytest.raises(PreconditionFailed):
            await library.delete("broken", expect=Precondition(if_match="*").check)
        assert "broken" in {record.name for record in library.page().records}
        await library.delete("broken")
        assert "broken" not in {record.name for record in library.page().records}


@in_a_loop
async def test_a_directory_that_breaks_leaves_its_last_good_version_in_service(tmp_path: Path, adapters: Path) -> None:
    async with open_library(tmp_path / "store") as (library, _):
        await library.discover(adapters)
        (adapters / "sql" / "adapter_model.safetensors").write_bytes(b"short")
        assert "sql" in (await library.discover(adapters)).failed
        record = await library.show("sql")
        assert record.state is VersionState.READY
        assert record.failure is not None
        (await library.resolve("sql")).release()


@in_a_loop
async def test_another_base_has_the_directory_checked_again(tmp_path: Path, adapters: Path) -> None:
    async with open_library(tmp_path / "store") as (library, _):
        await library.discover(adapters)
    async with open_library(tmp_path / "store", make_target("sha256:base-two")) as (library, _):
        assert (await library.discover(adapters)).added == ["org/poet", "sql"]
        (await library.resolve("sql")).release()
    async with open_library(tmp_path / "store") as (library, _):
        assert (await library.discover(adapters)).unchanged == ["org/poet", "sql"]
        (await library.resolve("sql")).release()
        assert library.look_up("sql").version == 1


@in_a_loop
async def test_one_directory_is_registered_under_a_name_of_choice(tmp_path: Path, adapters: Path) -> None:
    async with open_library(tmp_path / "store") as (library, _):
        await library.register(AdapterDirectory("mine", adapters / "sql"))
        assert library.look_up("mine").version == 1
        with pytest.raises(FileNotFoundError):
            await library.register(AdapterDirectory("gone", adapters / "nowhere"))
        assert (await library.show("gone")).state is VersionState.FAILED


@in_a_loop
async def test_a_directory_that_is_none_is_refused(tmp_path: Path, adapters: Path) -> None:
    async with open_library(tmp_path / "store") as (library, _):
        with pytest.raises(NotADirectory, match="does not exist"):
            await library.discover(tmp_path / "nowhere")
        with pytest.raises(NotADirectory, match="itself"):
            await library.discover(adapters / "sql")


@in_a_loop
async def test_pages_hold_failed_directories_where_their_names_belong(tmp_path: Path, adapters: Path) -> None:
    for name in ("a-broken", "z-broken"):
        write_files(adapters / name, make_files(1) | {"adapter_model.safetensors": b"short"})
    async with open_library(tmp_path / "store") as (library, _):
        await library.discover(adapters)
        for limit in (1, 2, 3, 4, 5):
            seen: list[str] = []
            after: str | None = ""
            while after is not None:
                page = library.page(limit=limit, after=after)
                assert len(page.records) <= limit
                seen += [record.name for record in page.records]
                after = page.next_after
            assert seen == ["a-broken", "org/poet", "sql", "z-broken"]
        failed = library.page(limit=1, state=VersionState.FAILED)
        assert ([record.name for record in failed.records], failed.next_after) == (["a-broken"], "a-broken")
        rest = library.page(after="a-broken", state=VersionState.FAILED)
        assert ([record.name for record in rest.records], rest.next_after) == (["z-broken"], None)
        assert library.num_by_state() == {VersionState.READY: 2, VersionState.FAILED: 2}


@in_a_loop
async def test_a_model_of_several_adapters_is_as_many_and_a_trainers_checkpoints_are_none(
    tmp_path: Path, adapters: Path
) -> None:
    write_files(adapters / "both", make_files(3))
    write_files(adapters / "both" / "other", make_files(4))
    write_files(adapters / "both" / "checkpoint-500", make_files(5))
    async with open_library(tmp_path / "store") as (library, _):
        result = await library.discover(adapters)
        assert result == (["both", "both/other", "org/poet", "sql"], [], {})
        assert {file.path for file in library.look_up("both").files} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }


@in_a_loop
async def test_a_folder_with_one_named_adapter_in_it_is_that_adapter(tmp_path: Path) -> None:
    write_files(tmp_path / "out" / "poet", make_files(3))
    async with open_library(tmp_path / "store") as (library, _):
        await library.register(AdapterDirectory("mine", tmp_path / "out"))
        assert (await library.discover(tmp_path)).added == ["out/poet"]
        write_files(tmp_path / "out" / "sql", make_files(4))
        with pytest.raises(FileRefused, match="several adapters: poet, sql"):
            await library.register(AdapterDirectory("mine", tmp_path / "out"))


@in_a_loop
async def test_the_files_of_another_library_are_taken_to_its_decoder(tmp_path: Path, adapters: Path) -> None:
    config = json.dumps({"config": {"architecture": "what"}, "model_type": "llama", "version": "adapters.1.3.0"})
    files = {"adapter_config.json": config.encode(), "head_config.json": b"{}"}
    weights = make_files()["adapter_model.safetensors"]
    write_files(adapters / "hub", {**files, "adapter.safetensors": weights})
    write_files(adapters / "two", {**files, "adapter.safetensors": weights, "adapter_model.safetensors": weights})
    async with open_library(tmp_path / "store") as (library, loader):
        failed = (await library.discover(adapters)).failed
        assert sorted(failed) == ["hub", "two"]
        assert 'field "name"' in failed["hub"]  # in the words of AdapterHub's decoder
        assert "Remove one" in failed["two"]
        assert loader.num_jobs == 3


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_adapter.bin", "adapters.safetensors"])
@in_a_loop
async def test_what_must_be_converted_is_refused_with_the_command(tmp_path: Path, name: str) -> None:
    write_files(tmp_path / "all" / "x", {"adapter_config.json": b"{}", name: b"\x80"})
    async with open_library(tmp_path / "store") as (library, _):
        assert "veneer adapters convert" in (await library.discover(tmp_path / "all")).failed["x"]
