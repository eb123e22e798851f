"""Adapters that a request brings in by naming them: only what is allowed, once at a time, and at nobody's cost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from adapters_store.errors import AdapterNotFound, AliasNotFound
from server.library.errors import SourceUnavailable
from server.library.sources import auto_load
from server.library.sources.auto_load import AutoLoader
from server.library.sources.policy import SourcePolicy
from server.loader.errors import AdapterRefused
from tests.library.loopback_hub import LoopbackHub, Repo
from tests.library.source_samples import Place, adapter_files, becomes_empty, open_place

Test = Callable[[AutoLoader, Place, LoopbackHub], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def no_ambient_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


def visit(tmp_path: Path, test: Test, patience_s: float = 30.0, **more: Any) -> None:
    repos = {
        "org/sql": Repo(adapter_files(num_bytes=200_000)),
        "org/private": Repo(adapter_files(), token="hf_x"),
        "org/strange": Repo({**adapter_files(), "adapter_config.json": b'{"use_strange": true}'}),
        "evil/sql": Repo(adapter_files()),
    }

    async def inside(hub: LoopbackHub) -> None:
        policy = SourcePolicy(hub_endpoint=hub.url, auto_load=("org/*", "team/sql-?"))
        async with open_place(tmp_path / "store", policy) as place:
            loader = AutoLoader(place.library, place.puller, patience_s)
            await test(loader, place, hub)
            await loader.close()
            assert await becomes_empty(place)

    with LoopbackHub(repos, **more) as hub:
        asyncio.run(asyncio.wait_for(inside(hub), 60))


def test_an_unknown_name_is_fetched_once_however_many_ask(tmp_path: Path) -> None:
    async def test(loader: AutoLoader, place: Place, hub: LoopbackHub) -> None:
        leases = await asyncio.gather(*(loader.resolve("org/sql") for _ in range(20)))
        assert {str(lease.version) for lease in leases} == {"org/sql@1"}
        assert leases[0].version.source.revision == hub.repos["org/sql"].commit
        for lease in leases:
            lease.release()
        assert len([asked for asked in hub.asked if asked.path.startswith("/api/models/")]) == 1
        hub.asked.clear()
        (await loader.resolve("org/sql")).release()
        assert hub.asked == []

    visit(tmp_path, test)


@pytest.mark.parametrize("name", ["evil/sql", "sql", "team/sql-10", "org", "evil/org", "orgs/sql"])
def test_what_no_pattern_covers_is_not_looked_for(tmp_path: Path, name: str) -> None:
    async def test(loader: AutoLoader, place: Place, hub: LoopbackHub) -> None:
        with pytest.raises(AdapterNotFound):
            await loader.resolve(name)
        assert hub.asked == []

    visit(tmp_path, test)


def test_a_version_or_an_alias_is_never_fetched(tmp_path: Path) -> None:
    async def test(loader: AutoLoader, place: Place, hub: LoopbackHub) -> None:
        for reference in ("org/sql@3", "org/sql@prod"):
            with pytest.raises(AdapterNotFound):
                await loader.resolve(reference)
        assert hub.asked == []
        (await loader.resolve("org/sql@default")).release()
        with pytest.raises(AliasNotFound):
            await loader.resolve("org/sql@prod")

    visit(tmp_path, test)


def test_what_is_private_and_what_does_not_exist_are_told_alike_and_not_asked_for_again(tmp_path: Path) -> None:
    async def test(loader: AutoLoader, place: Place, hub: LoopbackHub) -> None:
        told = set()
        for name in ("org/private", "org/nothing") * 3:
            with pytest.raises(AdapterNotFound) as caught:
                await loader.resolve(name)
            told.add(str(caught.value).replace(name, "NAME"))
        assert len(told) == 1
        assert len(hub.asked) == 2

    visit(tmp_path, test)


def test_after_a_while_it_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(loader: AutoLoader, place: Place, hub: LoopbackHub) -> None:
        with pytest.raises(AdapterNotFound):
            await loader.resolve("org/new")
        hub.repos["org/new"] = Repo(adapter_files())
        with pytest.raises(AdapterNotFound):
            await loader.resolve("org/new")
        monkeypatch.setattr(auto_load, "_REMEMBERED_S", 0.0)
        (await loader.resolve("org/new")).release()

    visit(tmp_path, test)


def test_failures_that_are_remembered_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_load, "_MAX_REMEMBERED", 5)

    async def test(loader: AutoLoader, place: Place, hub: LoopbackHub) -> None:
        for number in range(12):
            with pytest.raises(AdapterNotFound):
                await loader.resolve(f"org/x{number}")
        assert len(loader._failures) == 5

    visit(tmp_path, test)


def test_an_adapter_that_is_refused_says_why(tmp_path: Path) -> None:
    async def test(loader: AutoLoader, place: Place, hub: LoopbackHub) -> None:
        for _ in range(2):
            with pytest.raises(AdapterRefused, match="use_strange"):
                await loader.resolve("org/strange")
        assert place.library.num_adapters == 0

    visit(tmp_path, test)


def test_a_slow_download_asks_for_another_try_and_goes_on(tmp_path: Path) -> None:
    async def test(loader: AutoLoader, place: Place, hub: LoopbackHub) -> None:
        with pytest.raises(SourceUnavailable, match="still being fetched"):
            await loader.resolve("org/sql")
        assert hub.stall is not None
        hub.stall.set()
        for _ in range(2000):
            if place.library.num_adapters:
                break
            await asyncio.sleep(0.02)
        (await loader.resolve("org/sql")).release()
        assert len([asked for asked in hub.asked if asked.path.startswith("/api/models/")]) == 1

    visit(tmp_path, test, patience_s=0.5, stall=threading.Event())
