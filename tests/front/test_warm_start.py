"""A restarted server has on its device what it had before, and says ready after that."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from adapters_store.errors import AdapterNotFound
from server.engine.client import EngineClient, EngineEvent, LoadProgress
from server.engine.errors import AdapterLoadFailed, EngineUnavailable, NoRoomForAdapter
from server.engine.request import AdapterState, AdapterTicket, ResidentAdapter
from server.engine.supervisor import EngineState
from server.front import warm_start
from server.front.front import Front
from server.front.warm_start import WarmStart
from server.library.library import Library
from server.settings import Settings
from tests.front.letters import save_letters
from tests.tiny_models import make_lora, make_model


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("warm")
    model = make_model("llama", seed=1)
    model.save_pretrained(home / "model")
    save_letters(home / "model")
    for index, name in enumerate(("sql", "poet")):
        make_lora(model, home / "adapters" / name, rank=4, seed=index)
    return Settings(
        model=str(home / "model"),
        store_dir=home / "store",
        adapters_dir=home / "adapters",
        num_threads=1,
        probe_adapters=False,
    )


async def here(front: Front) -> set[str]:
    return {one.name for one in await front.engine.residency() if one.state == "device"}


async def a_damaged_image_is_made_anew(front: Front) -> None:
    """Who meets the damage is told; whoever comes later meets a whole image."""
    with await front.library.resolve("sql@1") as lease:
        image = open(lease.ticket.image_path, "r+b", buffering=0)  # noqa: ASYNC230, SIM115 -- nothing else runs
        await front.engine.evict(lease.ticket.key)
        image.seek(-1, os.SEEK_END)
        last = image.read(1)
        image.seek(-1, os.SEEK_END)
        image.write(bytes([last[0] ^ 1]))
        image.close()
        with pytest.raises(AdapterLoadFailed, match="checksum"):
            await front.engine.load(lease.ticket)
        while True:
            await asyncio.sleep(0.05)
            if await here(front) == {"sql@1"}:
                break


def test_what_was_on_the_device_is_there_again_before_ready(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_start, "_EVERY_S", 0.05)

    async def scene() -> None:
        front = await Front.start(settings)
        assert await here(front) == set(), "nothing was there before"
        for name in ("sql@1", "poet@1"):
            with await front.library.resolve(name) as lease:
                await front.engine.load(lease.ticket)
        await front.close()

        told: list[EngineEvent] = []
        front = await Front.start(settings, on_event=told.append)
        try:
            assert await here(front) == {"sql@1", "poet@1"}
            assert any(isinstance(one, LoadProgress) and "last run" in one.stage for one in told)
            await front.library.delete("poet")
            assert front.engine.pid is not None
            os.kill(front.engine.pid, signal.SIGKILL)
            while True:  # the engine that is started in its place gets the list, too, but for what is gone
                await asyncio.sleep(0.05)
                if front.engine.num_restarts and front.engine.state == "ready" and await here(front) == {"sql@1"}:
                    break
            await a_damaged_image_is_made_anew(front)
        finally:
            await front.close()

    asyncio.run(asyncio.wait_for(scene(), 120))


class FakeEngine:
    """Room for two; knows nothing of a process."""

    num_restarts = 0
    state = EngineState.READY
    on_device: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.is_gone = False

    async def load(self, ticket: AdapterTicket) -> AdapterState:
        if "broken" in ticket.name:
            raise AdapterLoadFailed("truncated")
        if len(self.loaded) == 2:
            raise NoRoomForAdapter("no room")
        self.loaded.append(ticket.name)
        return AdapterState.DEVICE

    async def residency(self) -> list[ResidentAdapter]:
        if self.is_gone:
            raise EngineUnavailable("gone")
        uses = enumerate(self.loaded, 1)
        return [ResidentAdapter(name, name, AdapterState.DEVICE, 1, 1, 0, 0.0, num_uses=n) for n, name in uses]


class FakeLibrary:
    async def resolve(self, reference: str) -> Any:
        if "gone" in reference:
            raise AdapterNotFound("gone")
        return FakeLease(AdapterTicket(reference, reference, "", 1))


@dataclass
class FakeLease:
    ticket: AdapterTicket

    def __enter__(self) -> FakeLease:
        return self

    def __exit__(self, *_: object) -> None: ...


def on(path: Path) -> tuple[WarmStart, FakeEngine]:
    engine = FakeEngine()
    return WarmStart(cast(EngineClient, engine), cast(Library, FakeLibrary()), path), engine


@pytest.mark.parametrize("content", ["{", "[]", '{"adapters": 7}', '{"adapters": [7, null]}', None])
def test_a_list_that_is_damaged_or_missing_stops_nothing(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "warm" / "list.json"
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)
    warm, _ = on(path)
    assert asyncio.run(warm.load(print)) == 0


def test_what_is_gone_or_broken_is_passed_over_and_what_has_no_room_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"adapters": ["gone@1", "a@1", "broken@1", "b@1", "c@1", "d@1"]}))
    warm, engine = on(path)
    assert asyncio.run(warm.load(print)) == 2
    assert engine.loaded == ["a@1", "b@1"]


def test_the_list_is_written_most_used_first_and_kept_when_the_engine_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "warm" / "list.json"
    warm, engine = on(path)
    engine.loaded = ["seldom@1", "often@1"]
    asyncio.run(warm.save())
    assert json.loads(path.read_text()) == {"adapters": ["often@1", "seldom@1"]}
    engine.loaded, engine.is_gone = [], True
    asyncio.run(warm.save())
    assert json.loads(path.read_text()) == {"adapters": ["often@1", "seldom@1"]}


def test_a_start_waits_no_longer_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "MAX_LOADING_S", -1.0)
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"adapters": ["a@1"]}))
    assert asyncio.run(on(path)[0].load(print)) == 0
