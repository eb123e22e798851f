"""Operations: progress as it happens, ends of every kind, cancelling, and what is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx

from adapters_store.errors import DiskFull
from server.api import operation as operation_module
from server.api.operation import Operation
from tests.api.asgi_call import AsgiCall
from tests.api.conftest import Door, Visit

ADDRESS = "/admin/v1/operations"


async def nothing(running: Operation) -> Mapping[str, Any] | None:
    return {"name": "sql", "version": 3}


async def show(door: Door, operation: Operation, query: str = "") -> dict[str, Any]:
    answer = await door.client.get(f"{ADDRESS}/{operation.id}{query}")
    assert answer.status_code == 200
    return dict(answer.json())


def test_an_operation_tells_its_steps_and_its_result(visit: Visit) -> None:
    async def test(door: Door) -> None:
        go = asyncio.Event()

        async def work(running: Operation) -> Mapping[str, Any]:
            running.enter("downloading")
            running.advance(5, 20)
            await go.wait()
            return {"name": "sql", "version": 3}

        started = door.service.operations.start("adapter.register", "sql", work, actor="me")
        await asyncio.sleep(0)
        seen = await show(door, started)
        assert (seen["object"], seen["kind"], seen["target"]) == ("operation", "adapter.register", "sql")
        assert (seen["done"], seen["status"]) == (False, "downloading")
        assert seen["progress"] == {"completed": 5, "total": 20, "unit": "bytes"}
        waiting = asyncio.create_task(show(door, started, "?wait=30"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        go.set()
        ended = await waiting
        assert (ended["done"], ended["status"], ended["result"]["version"]) == (True, "succeeded", 3)
        listed = (await door.client.get(ADDRESS)).json()["data"]
        assert [one["id"] for one in listed] == [started.id]

    visit(test)


def test_waiting_for_an_operation_ends_with_the_time_that_was_given(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def work(running: Operation) -> None:
            await asyncio.Event().wait()

        started = door.service.operations.start("x", "sql", work, actor="me")
        assert (await show(door, started, "?wait=0.05"))["done"] is False
        await started.cancel()

    visit(test)


def test_its_changes_are_streamed_until_it_ends(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def work(running: Operation) -> None:
            running.enter("downloading")
            for number in range(3):
                await asyncio.sleep(0.02)
                running.advance(number, 3)

        started = door.service.operations.start("x", "sql", work, actor="me")
        answer = await door.client.get(f"{ADDRESS}/{started.id}/events")
        assert answer.headers["content-type"] == "text/event-stream"
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
        assert [event["progress"]["completed"] for event in events if event["status"] == "downloading"][-3:] == [
            0,
            1,
            2,
        ]
        assert [event["done"] for event in events] == [False] * (len(events) - 1) + [True]

    visit(test)


def test_whoever_follows_and_leaves_does_not_stop_it(visit: Visit) -> None:
    async def test(door: Door) -> None:
        go = asyncio.Event()

        async def work(running: Operation) -> None:
            await go.wait()

        started = door.service.operations.start("x", "sql", work, actor="me")
        call = AsgiCall(door.app, f"{ADDRESS}/{started.id}/events", {}, "GET")
        await call.wait_for_chunks(1)
        call.leave()
        await call.finish()
        go.set()
        assert await started.wait(5)
        assert started.status == "succeeded"

    visit(test)


def test_an_operation_is_cancelled_and_cleans_up_before_the_answer(visit: Visit) -> None:
    async def test(door: Door) -> None:
        cleaned = []

        async def work(running: Operation) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.01)
                cleaned.append(running.id)

        started = door.service.operations.start("x", "sql", work, actor="me")
        await asyncio.sleep(0)
        answer = await door.client.delete(f"{ADDRESS}/{started.id}")
        assert (answer.status_code, answer.json()["status"], cleaned) == (200, "cancelled", [started.id])
        again = await door.client.delete(f"{ADDRESS}/{started.id}")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "operation_done")

    visit(test)


def test_one_that_is_cancelled_before_its_first_step_is_cancelled(visit: Visit) -> None:
    async def test(door: Door) -> None:
        started = door.service.operations.start("x", "sql", nothing, actor="me")
        await started.cancel()
        assert started.status == "cancelled"

    visit(test)


def test_what_is_committing_is_not_cancelled(visit: Visit) -> None:
    async def test(door: Door) -> None:
        go = asyncio.Event()

        async def work(running: Operation) -> None:
            running.seal()
            await go.wait()

        started = door.service.operations.start("x", "sql", work, actor="me")
        await asyncio.sleep(0)
        answer = await door.client.delete(f"{ADDRESS}/{started.id}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "operation_sealed")
        go.set()
        assert await started.wait(5)
        assert started.status == "succeeded"

    visit(test)


def test_a_failure_is_told_as_the_route_would_have_told_it(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def full(running: Operation) -> None:
            raise DiskFull("the disk is full")

        async def bug(running: Operation) -> None:
            raise KeyError("a secret detail")

        known = door.service.operations.start("x", "sql", full, actor="me")
        unknown = door.service.operations.start("x", "sql", bug, actor="me")
        assert await known.wait(5)
        assert await unknown.wait(5)
        told = (await show(door, known))["error"]
        assert (told["code"], told["message"]) == ("disk_full", "the disk is full")
        told = (await show(door, unknown))["error"]
        assert (told["code"], "secret" in told["message"]) == ("internal", False)

    visit(test)


def test_an_unknown_operation_is_not_found(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            answer: httpx.Response = await door.client.request(method, f"{ADDRESS}/op_nobody{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "operation_not_found")

    visit(test)


def test_only_the_last_ones_that_ended_are_kept(visit: Visit, monkeypatch: Any) -> None:
    monkeypatch.setattr(operation_module, "MAX_KEPT", 3)

    async def test(door: Door) -> None:
        async def endless(running: Operation) -> None:
            await asyncio.Event().wait()

        book = door.service.operations
        running = book.start("x", "runs", endless, actor="me")
        for number in range(6):
            assert await book.start("x", f"done-{number}", nothing, actor="me").wait(5)
        kept = [operation.target for operation in book.all()]
        assert len(kept) <= 4
        assert "runs" in kept
        assert "done-5" in kept
        await running.cancel()

    visit(test)
