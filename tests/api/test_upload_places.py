"""Uploads under way are bounded, in number and in bytes, and what they do to the disk holds no request up."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from adapters_store.staging import Stage, StageLimits
from server.api.app import create_app
from server.front.front import Front
from server.settings import Settings
from tests.api.conftest import Door, Visit, safetensors_bytes
from tests.api.fake_front import FakeFront

ADAPTERS = "/admin/v1/adapters"
BLOB = "/admin/v1/blobs/sha256:"


class SlowUpload:
    """An upload that stops in the middle until it is told to go on."""

    def __init__(self, door: Door, method: str = "POST", path: str = ADAPTERS, name: str = "slow") -> None:
        request = door.client.build_request("POST", ADAPTERS, files=door.parts(name))
        self._content = request.read()
        self._begun, self._go_on = asyncio.Event(), asyncio.Event()
        headers = {"content-type": request.headers["content-type"]} if path == ADAPTERS else {}
        self._task = asyncio.create_task(door.client.request(method, path, content=self._pieces(), headers=headers))

    async def begin(self) -> SlowUpload:
        await self._begun.wait()
        return self

    async def end(self) -> httpx.Response:
        self._go_on.set()
        return await self._task

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield self._content[:50]
        self._begun.set()
        await self._go_on.wait()
        yield self._content[50:]


def test_so_many_uploads_arrive_at_once_and_the_next_is_told_when(visit: Visit) -> None:
    async def test(door: Door) -> None:
        first = await SlowUpload(door, name="one").begin()
        second = await SlowUpload(door, "PUT", BLOB + "0" * 64).begin()
        for attempt in (
            door.upload("sql"),
            door.client.put(ADAPTERS + "/sql", content=b"x"),
            door.client.put(BLOB + "1" * 64, content=b"x"),
        ):
            answer = await attempt
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_uploads")
            assert int(answer.headers["retry-after"]) >= 1
        assert len(door.leftovers()) == 2
        assert (await second.end()).status_code == 400, "a refused one gives its place back, too"
        assert (await door.upload("sql")).status_code == 201
        assert (await first.end()).status_code == 201
        assert door.service.uploads.num_taken == 0
        assert door.leftovers() == []

    visit(test, max_concurrent_uploads=2)


@contextlib.asynccontextmanager
async def narrow_door(root: Path, max_staged_bytes: int) -> AsyncIterator[Door]:
    limits = StageLimits(10**6, 10**6, reserve_bytes=0, max_staged_bytes=max_staged_bytes)
    front = await FakeFront.start(root, limits=limits)
    app = create_app(Settings(), cast(Front, front))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000") as client:
        door = Door(front, client, Settings())
        door.app, door.root = app, root
        yield door
    await front.close()


def is_full(answer: httpx.Response) -> bool:
    return (
        answer.status_code == 429
        and answer.json()["error"]["code"] == "staging_full"
        and answer.headers["retry-after"] == "5"
    )


def test_what_uploads_take_together_is_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        async with narrow_door(tmp_path / "store", 3000) as door:
            staged = door.front.library.catalog.staged
            assert is_full(await door.client.put(BLOB + "1" * 64, content=b"x" * 3001)), "announced"

            async def pieces() -> AsyncIterator[bytes]:
                for _ in range(31):
                    yield b"x" * 100

            assert is_full(await door.client.put(BLOB + "1" * 64, content=pieces())), "it does not say its length"
            assert is_full(await door.client.put(ADAPTERS + "/sql", content=pieces())), "an archive counts as well"
            assert staged.num_bytes == 0, "what was refused is given back"
            slow = await SlowUpload(door).begin()
            assert (await door.upload("sql")).status_code == 201
            data = b"y" * 2900
            assert (await door.client.put(BLOB + hashlib.sha256(data).hexdigest(), content=data)).status_code == 201
            assert (await slow.end()).status_code == 201
            assert staged.num_bytes == 0
            assert door.leftovers() == []

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_bound_below_one_upload_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="max-staged-bytes"):
        Settings(max_staged_bytes=10, max_upload_bytes=11)


@pytest.fixture
def stage_threads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(what, thread) of everything that stages do to the disk by whole directories."""
    seen: list[tuple[str, int]] = []
    opened, closed = Stage.__init__, Stage.close

    def open_(self: Stage, *arguments: Any, **options: Any) -> None:
        seen.append(("open", threading.get_ident()))
        opened(self, *arguments, **options)

    def close(self: Stage) -> None:
        seen.append(("close", threading.get_ident()))
        closed(self)

    monkeypatch.setattr(Stage, "__init__", open_)
    monkeypatch.setattr(Stage, "close", close)
    return seen


def test_the_event_loop_makes_and_removes_no_stage(visit: Visit, stage_threads: list[tuple[str, int]]) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        await door.upload("sql", config=b"no json")
        await door.client.post(ADAPTERS + "?dry_run=true", files=door.parts("sql"))
        await door.client.put(ADAPTERS + "/sql", content=b"no archive")
        weights = safetensors_bytes()
        place = BLOB + hashlib.sha256(weights).hexdigest()
        assert (await door.client.put(place, content=weights)).status_code == 201
        source = {"files": {"adapter_model.safetensors": place.rpartition("/")[2]}}
        await door.client.post(ADAPTERS + "?wait=20", json={"name": "sql", "source": source})
        assert {what for what, _ in stage_threads} == {"open", "close"}
        assert len(stage_threads) >= 12
        assert threading.get_ident() not in {thread for _, thread in stage_threads}
        with door.front.library.stage():
            pass
        assert threading.get_ident() in {thread for _, thread in stage_threads}, "the control"

    visit(test)


def test_a_caller_that_leaves_while_its_stage_is_made_leaves_none(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(door: Door) -> None:
        making, go_on, made = threading.Event(), threading.Event(), threading.Event()
        make = door.front.library.catalog.stage

        def slowly() -> Stage:
            making.set()
            go_on.wait(10)
            stage = make()
            assert door.leftovers() == [stage.directory.name], "the control: there is something to leave behind"
            made.set()
            return stage

        monkeypatch.setattr(door.front.library.catalog, "stage", slowly)
        upload = asyncio.create_task(door.upload("sql"))
        assert await asyncio.to_thread(making.wait, 10)
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        go_on.set()
        assert await asyncio.to_thread(made.wait, 10)
        for _ in range(500):
            if not door.leftovers():
                break
            await asyncio.sleep(0.01)
        assert (door.leftovers(), door.service.uploads.num_taken) == ([], 0)

    visit(test)
