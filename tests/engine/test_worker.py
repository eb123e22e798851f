"""The engine's process, spoken to directly over its channel."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.channel import Message, Worker, spawn
from server.engine import wire
from server.engine.config import EngineConfig
from server.engine.request import EngineRequest, SamplingParams

BUILD = "tests.engine.fake_engine:build_engine"


class Conversation:
    """One worker and everything it said."""

    worker: Worker

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.is_over = False

    def on_message(self, message: Message) -> None:
        self.heard.append(message)

    def on_close(self) -> None:
        self.is_over = True

    def of_kind(self, kind: str) -> list[Message]:
        return [message for message in self.heard if message["kind"] == kind]

    def submit(self, request_id: str, num_tokens: int) -> None:
        asked = EngineRequest(request_id, (10, 20), SamplingParams(num_tokens, ignore_eos=True))
        self.worker.channel.send({"kind": wire.SUBMIT, "request": wire.request_to_json(asked)})

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline_s, self.heard[-3:]
            await asyncio.sleep(0.005)


@asynccontextmanager
async def worker(script: str = "fake", build: str = BUILD) -> AsyncIterator[Conversation]:
    talk = Conversation()
    arguments = ("--build", build)
    talk.worker = await spawn("server.engine.worker", *arguments, on_message=talk.on_message, on_close=talk.on_close)
    try:
        talk.worker.channel.send({"kind": "start", "config": EngineConfig(script).to_json()})
        await talk.until(lambda: bool(talk.of_kind(wire.READY) or talk.of_kind(wire.FAILED)))
        yield talk
    finally:
        await talk.worker.close()


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 60)

    asyncio.run(bounded())


def test_progress_comes_before_ready_and_numbers_after_work() -> None:
    async def scene() -> None:
        async with worker() as talk:
            kinds = [message["kind"] for message in talk.heard]
            assert kinds.index(wire.PROGRESS) < kinds.index(wire.READY)
            talk.submit("a", 3)
            await talk.until(lambda: any(told["stats"]["total_finished"] for told in talk.of_kind(wire.STATS)))

    run(scene())


def test_a_step_is_one_message_however_many_requests_it_served() -> None:
    async def scene() -> None:
        async with worker("fake step_ms=20") as talk:
            for index in range(40):
                talk.submit(f"r{index}", 10)
            await talk.until(lambda: talk.heard[-1].get("stats", {}).get("total_finished") == {"length": 40})
            assert 10 <= len(talk.of_kind(wire.STEP)) <= 14  # the first requests may be a step or two ahead
            assert max(len(step["ids"]) for step in talk.of_kind(wire.STEP)) == 40

    run(scene())


def test_statistics_come_at_most_ten_times_a_second() -> None:
    async def scene() -> None:
        async with worker("fake step_ms=1") as talk:
            talk.submit("a", 400)
            await talk.until(lambda: bool(talk.of_kind(wire.STEP)) and not talk.of_kind(wire.STEP)[-1]["ids"])
            started_s, before = time.monotonic(), len(talk.of_kind(wire.STATS))
            talk.submit("b", 100_000)
            await asyncio.sleep(1.0)
            told = len(talk.of_kind(wire.STATS)) - before
            assert 1 <= told <= 10 * (time.monotonic() - started_s) + 2

    run(scene())


def test_signals_are_left_to_the_front_and_the_end_of_the_channel_is_the_end() -> None:
    async def scene() -> None:
        async with worker("fake step_ms=1") as talk:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(talk.worker.process.pid, number)
            talk.submit("a", 5)
            await talk.until(lambda: any(told["stats"]["total_finished"] for told in talk.of_kind(wire.STATS)))
            talk.submit("b", 1_000_000)
            await talk.until(lambda: talk.of_kind(wire.STATS)[-1]["stats"]["num_running"] == 1)
            talk.worker.channel.close()
            await asyncio.wait_for(talk.worker.process.wait(), 20)

    run(scene())


def test_told_to_stop_it_ends_cleanly() -> None:
    async def scene() -> None:
        async with worker() as talk:
            talk.worker.channel.send({"kind": wire.STOP})
            assert await asyncio.wait_for(talk.worker.process.wait(), 20) == 0

    run(scene())


def test_asked_for_stacks_it_tells_them_and_works_on(capfd: pytest.CaptureFixture[str]) -> None:
    async def scene() -> None:
        async with worker() as talk:
            os.kill(talk.worker.process.pid, signal.SIGUSR1)
            talk.submit("a", 3)
            await talk.until(lambda: any(told["stats"]["total_finished"] for told in talk.of_kind(wire.STATS)))

    run(scene())
    assert "server/engine/worker.py" in capfd.readouterr().err


def test_a_builder_that_is_not_there_is_told_as_a_failure() -> None:
    async def scene() -> None:
        async with worker(build="tests.engine.fake_engine:nobody") as talk:
            (failure,) = talk.of_kind(wire.FAILED)
            assert "nobody" in failure["message"]
            assert await asyncio.wait_for(talk.worker.process.wait(), 20) == 1

    run(scene())


def test_a_worker_writes_nothing_where_it_runs() -> None:
    """It is started in the front's directory, which may be read-only."""
    before = set(Path.cwd().iterdir())

    async def scene() -> None:
        async with worker() as talk:
            talk.submit("a", 2)
            await talk.until(lambda: bool(talk.of_kind(wire.STEP)))

    run(scene())
    assert set(Path.cwd().iterdir()) == before
