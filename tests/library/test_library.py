from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters_store.errors import AdapterNotFound, InvalidHeader, InvalidName, VersionNotFound
from adapters_store.record import Content, VersionState
from peft_core.image import read_header
from peft_core.traits import AdapterTraits
from server.engine.request import AdapterTicket
from server.library.errors import AdapterUnusable
from server.library.lease import AdapterLease
from server.loader.errors import AdapterRefused, LoaderUnavailable
from tests.library.library_samples import (
    drop_image,
    eventually,
    image_bytes,
    in_a_loop,
    make_files,
    make_target,
    open_library,
    upload,
)


def leftovers(store: Path) -> list[str]:
    """Files of anything uploaded: blobs, images, stages, records."""
    folders = ("staging", "images", "versions", "blobs", "aliases")
    return [str(path) for folder in folders for path in (store / folder).rglob("*") if path.is_file()]


@in_a_loop
async def test_an_upload_is_committed_and_resolved_with_what_the_engine_needs(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        committed = await upload(library, "sql", make_files(1))
        assert committed.created
        with await library.resolve("sql") as lease:
            header, _ = read_header(Path(lease.ticket.image_path))
            assert lease.ticket.num_bytes == header["num_bytes"]
            assert lease.ticket.name == "sql@1"
            assert lease.ticket.key == committed.version.content.effect_digest
            assert library.catalog.leases.total() == 1
        assert library.catalog.leases.total() == 0
        assert list((tmp_path / "staging").iterdir()) == []
        report = (await library.show("sql")).versions[0].content.report
        assert report["ranks"] == [4]


@in_a_loop
async def test_what_is_committed_needs_no_loader_after_a_restart(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        await upload(library, "sql", make_files(1))
    async with open_library(tmp_path) as (library, loader):
        with await library.resolve("sql@1") as lease:
            assert image_bytes(lease)
        assert loader.num_jobs == 0


@in_a_loop
async def test_a_missing_image_is_packed_again_once_however_many_ask(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, loader):
        await upload(library, "sql", make_files(1))
        with await library.resolve("sql") as lease:
            before = image_bytes(lease)
            drop_image(lease)
        loader.num_jobs = 0
        leases = await asyncio.gather(*(library.resolve("sql") for _ in range(8)))
        assert loader.num_jobs == 1
        assert image_bytes(leases[0]) == before
        for held in leases:
            held.release()
        assert library.catalog.leases.total() == 0


@in_a_loop
async def test_another_dtype_gets_an_image_of_its_own(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        await upload(library, "sql", make_files(1))
        with await library.resolve("sql") as lease:
            wide = lease.ticket
    async with open_library(tmp_path, make_target(dtype="bfloat16")) as (library, loader):
        with await library.resolve("sql") as lease:
            assert lease.ticket.num_bytes < wide.num_bytes
            assert lease.ticket.image_path != wide.image_path
            assert lease.ticket.key == wide.key
        assert loader.num_jobs == 1


@in_a_loop
async def test_a_cancelled_waiter_does_not_stop_the_packing_for_the_others(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, loader):
        await upload(library, "sql", make_files(1))
        with await library.resolve("sql") as lease:
            drop_image(lease)
        loader.gate.clear()
        first, second = (asyncio.create_task(library.resolve("sql")) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0)
        loader.gate.set()
        (await second).release()
        assert first.cancelled()
        assert library.catalog.leases.total() == 0


@in_a_loop
async def test_an_upload_whose_sender_has_gone_is_completed(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, loader):
        loader.gate.clear()
        stage = library.stage()
        for path, data in make_files(1).items():
            stage.add_file(path, [data])
        task = asyncio.create_task(library.add(stage, "sql"))
        await asyncio.sleep(0.05)
        task.cancel()
        stage.close()  # as the sender's `with` block does
        with pytest.raises(asyncio.CancelledError):
            await task
        loader.gate.set()
        await eventually(lambda: library.num_adapters == 1)
        assert library.look_up("sql").version == 1


@in_a_loop
async def test_identical_uploads_at_once_do_the_work_once(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, loader):
        done = await asyncio.gather(*(upload(library, "sql", make_files(1)) for _ in range(6)))
        assert [item.version.version for item in done] == [1] * 6
        assert [item.created for item in done].count(True) == 1
        assert loader.num_jobs == 1
        others = await asyncio.gather(*(upload(library, "sql", make_files(seed)) for seed in (2, 3)))
        assert sorted(item.version.version for item in others) == [2, 3]  # different ones do not join


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"adapter_config.json": None}, AdapterRefused),
        ({"adapter_model.safetensors": None}, AdapterRefused),
        ({"adapter_model.safetensors": b"PK\x03\x04" * 10}, InvalidHeader),
        ({"adapter_model.safetensors": make_files(1)["adapter_model.safetensors"][:-3]}, InvalidHeader),
        ({"adapter_config.json": b"{"}, AdapterRefused),
        ({"adapter_config.json": make_files(1, init_lora_weights="lora_ga")["adapter_config.json"]}, AdapterRefused),
    ],
)
def test_a_refused_upload_leaves_nothing_behind(
    tmp_path: Path, change: dict[str, bytes | None], error: type[Exception]
) -> None:
    files = {name: data for name, data in (make_files(1) | change).items() if data is not None}

    @in_a_loop
    async def scenario() -> None:
        async with open_library(tmp_path) as (library, _):
            with pytest.raises(error):
                await upload(library, "sql", files)
            assert leftovers(tmp_path) == []
            with pytest.raises(AdapterNotFound):
                library.look_up("sql")

    scenario()


@in_a_loop
async def test_a_broken_header_never_reaches_the_loader(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, loader):
        with pytest.raises(InvalidHeader, match=r"^adapter_model\.safetensors"):
            await upload(library, "sql", make_files(1) | {"adapter_model.safetensors": b"x" * 100})
        assert loader.num_jobs == 0


@in_a_loop
async def test_a_bad_name_or_alias_is_refused_before_any_work(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, loader):
        with pytest.raises(InvalidName):
            await upload(library, "../sql", make_files(1))
        with pytest.raises(InvalidName):
            await upload(library, "sql", make_files(1), aliases=("v2",))
        assert loader.num_jobs == 0
        assert leftovers(tmp_path) == []


@in_a_loop
async def test_a_loader_that_dies_is_told_as_retryable_and_the_retry_works(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, loader):
        loader.failure = LoaderUnavailable("died")
        with pytest.raises(LoaderUnavailable):
            await upload(library, "sql", make_files(1))
        assert leftovers(tmp_path) == []
        loader.failure = None
        assert (await upload(library, "sql", make_files(1))).created


@in_a_loop
async def test_a_rank_over_the_operators_limit_is_refused(tmp_path: Path) -> None:
    async with open_library(tmp_path, max_rank=4) as (library, _):
        await upload(library, "sql", make_files(1, rank=4))
        with pytest.raises(AdapterRefused, match="rank 8") as caught:
            await upload(library, "big", make_files(1, rank=8))
        assert caught.value.code == "rank_too_large"
    async with open_library(tmp_path, max_rank=2) as (library, _):
        with pytest.raises(AdapterRefused, match="rank 4"):
            await library.resolve("sql")
        assert library.catalog.leases.total() == 0


@in_a_loop
async def test_a_version_for_another_base_is_told_and_not_served(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        await upload(library, "sql", make_files(1))
    async with open_library(tmp_path, make_target("sha256:base-two")) as (library, _):
        with pytest.raises(AdapterUnusable, match="Upload it again"):
            await library.resolve("sql")
        assert (await library.show("sql")).state is VersionState.INCOMPATIBLE
        assert (await upload(library, "sql", make_files(1))).version.version == 2
        (await library.resolve("sql")).release()
        assert library.catalog.leases.total() == 0


@in_a_loop
async def test_files_that_were_changed_in_the_store_are_not_served(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        version = (await upload(library, "sql", make_files(1))).version
        path = library.catalog.files_of(version)["adapter_model.safetensors"]
        path.write_bytes(make_files(2)["adapter_model.safetensors"])  # of the same length
        with await library.resolve("sql") as lease:
            drop_image(lease)
        with pytest.raises(AdapterUnusable, match="have changed"):
            await library.resolve("sql")
        assert (await library.show("sql")).state is VersionState.FAILED


@in_a_loop
async def test_a_deleted_adapter_finishes_its_requests(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        await upload(library, "sql", make_files(1))
        lease = await library.resolve("sql")
        deleted = await library.delete("sql", drain_timeout_s=0.05)
        assert deleted.num_leases_left == 1
        with pytest.raises(AdapterNotFound):
            await library.resolve("sql")
        assert image_bytes(lease)
        lease.release()
        await eventually(lambda: leftovers(tmp_path) == [])


@in_a_loop
async def test_a_deletion_waits_for_its_requests_no_longer_than_needed(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        await upload(library, "sql", make_files(1))
        lease = await library.resolve("sql")
        deletion = asyncio.create_task(library.delete("sql", drain_timeout_s=30))
        await asyncio.sleep(0.05)
        assert not deletion.done()
        lease.release()
        assert (await asyncio.wait_for(deletion, 5)).num_leases_left == 0


@in_a_loop
async def test_a_request_keeps_the_version_it_began_with(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        await upload(library, "sql", make_files(1))
        old = await library.resolve("sql")
        await upload(library, "sql", make_files(2))
        new = await library.resolve("sql")
        assert (old.version.version, new.version.version) == (1, 2)
        assert old.ticket.key != new.ticket.key
        await library.releases.move("sql", "default", {1: 1})
        assert library.look_up("sql").version == 1
        with pytest.raises(VersionNotFound):
            await library.releases.move("sql", "default", {9: 1})


@in_a_loop
async def test_what_is_kept_on_the_device_follows_the_alias_until_it_is_gone(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        kept: list[list[str]] = []

        async def keep(tickets: Sequence[AdapterTicket]) -> None:
            kept.append([ticket.name for ticket in tickets])

        library.pins.keep = keep
        for seed in (1, 2):
            await upload(library, "sql", make_files(seed))
        library.catalog.amend("sql", lambda said: replace(said, pinned=True))
        await library.pins.apply("sql")
        await library.releases.move("sql", "default", {1: 1})
        await library.releases.remove("sql", "default")
        assert kept == [["sql@2"], ["sql@1"], ["sql@2"]]


@in_a_loop
async def test_a_library_can_be_closed_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    waiting: list[Awaitable[Any]] = []
    async with open_library(tmp_path) as (library, loader):
        loader.gate.clear()
        waiting.append(asyncio.create_task(upload(library, "sql", make_files(1))))
        await asyncio.sleep(0.05)
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    assert leftovers(tmp_path) == []


@in_a_loop
async def test_the_list_has_every_adapter_sorted(tmp_path: Path) -> None:
    async with open_library(tmp_path) as (library, _):
        for name in ("b", "org/a", "a"):
            await upload(library, name, make_files(1))
        assert [record.name for record in library.page().records] == ["a", "b", "org/a"]
        assert [record.name for record in library.page("org/").records] == ["org/a"]
        with pytest.raises(AdapterNotFound):
            await library.show("c")


@in_a_loop
async def test_a_ticket_carries_the_traits_of_its_version_and_old_records_those_of_lora(tmp_path: Path) -> None:
    async with open_library(tmp_path / "store") as (library, _):
        version = (await upload(library, "sql", make_files())).version
        with await library.resolve("sql") as lease:
            assert lease.ticket.traits == AdapterTraits()
        traits = AdapterTraits(num_virtual_tokens=8, first_position=8, num_tasks=3, invocation_tokens=(1, 2))
        for report, expected in (({"traits": traits.to_json()}, traits), ({}, AdapterTraits())):
            stored: Any = SimpleNamespace(version=replace(version, content=Content("sha256:e", "base", report=report)))
            image: Any = SimpleNamespace(path=tmp_path, num_bytes=1)
            assert AdapterLease(stored, image).ticket.traits == expected


@in_a_loop
async def test_intact_files_are_packed_again_whatever_a_new_decoder_calls_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_library(tmp_path / "store") as (library, _):
        await upload(library, "sql", make_files())
        with await library.resolve("sql") as lease:
            drop_image(lease)
    monkeypatch.setattr("server.loader.effect._SCHEMA", "effect-of-tomorrow")
    async with open_library(tmp_path / "store") as (library, loader):
        with await library.resolve("sql") as lease:
            assert len(image_bytes(lease)) > 0
        assert loader.num_jobs == 1
        assert library.look_up("sql").state is VersionState.READY
