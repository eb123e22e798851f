"""The door to the engine, through real processes with an engine that needs no model."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.engine.client import EngineClient, EngineEvent, LoadProgress, StateChange
from server.engine.config import EngineConfig
from server.engine.delta_stream import DeltaStream
from server.engine.errors import AdapterBusy, AdapterLoadFailed, EngineStartError, EngineUnavailable, NoRoomForAdapter
from server.engine.launch import in_process
from server.engine.local import start_local
from server.engine.request import AdapterState, AdapterTicket, EngineRequest, FinishReason, RequestDelta, SamplingParams
from server.engine.supervisor import EngineState
from tests.engine.fake_engine import build_engine

BUILD = "tests.engine.fake_engine:build_engine"


@asynccontextmanager
async def engine(
    script: str = "fake", *, kind: str = "process", watchdog_s: float = 60.0, events: list[EngineEvent] | None = None
) -> AsyncIterator[EngineClient]:
    config, on_event = EngineConfig(script, watchdog_s=watchdog_s), None if events is None else events.append
    if kind == "thread":
        client = await start_local(config, build_engine, on_event=on_event)
    else:
        client = await EngineClient.start(config, on_event=on_event, launch=in_process(BUILD))
    try:
        yield client
    finally:
        await client.close()


def request(
    request_id: str,
    num_tokens: int = 5,
    adapter: AdapterTicket | None = None,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
) -> EngineRequest:
    asked: Any = {"num_logprobs": num_logprobs, "num_prompt_logprobs": num_prompt_logprobs}
    return EngineRequest(request_id, (10, 20), SamplingParams(num_tokens, ignore_eos=True, **asked), adapter)


async def last_finish(stream: DeltaStream) -> FinishReason | None:
    finish = None
    async for delta in stream:
        finish = delta.finish
    return finish


async def collect(client: EngineClient, asked: EngineRequest) -> list[RequestDelta]:
    return [delta async for delta in client.submit(asked)]


def tokens_of(deltas: list[RequestDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        await asyncio.sleep(0.01)


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 40)

    asyncio.run(bounded())


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_request_gets_its_tokens_and_one_end(kind: str) -> None:
    async def scene() -> None:
        events: list[EngineEvent] = []
        async with engine(kind=kind, events=events) as client:
            assert client.state is EngineState.READY
            assert client.description.vocab_size == 300
            deltas = await collect(client, request("a", 5))
            assert tokens_of(deltas) == [21, 22, 23, 24, 25]
            assert [delta.finish for delta in deltas if delta.finish] == [FinishReason.LENGTH]
            assert deltas[-1].finish is FinishReason.LENGTH
            assert client.num_in_flight == 0
            await until(lambda: client.stats().total_finished == {"length": 1})
        assert LoadProgress("load", 1.0) in events
        assert [event.state for event in events if isinstance(event, StateChange)] == ["ready", "stopped"]

    run(scene())


def test_many_requests_run_side_by_side_and_logprobs_stay_with_their_tokens() -> None:
    async def scene() -> None:
        async with engine() as client:
            asked = [request(f"r{i}", 10 + i, num_logprobs=2 if i % 2 else None) for i in range(64)]
            answers = await asyncio.gather(*(collect(client, one) for one in asked))
            for i, deltas in enumerate(answers):
                assert len(tokens_of(deltas)) == 10 + i
                records = [record for delta in deltas for record in delta.logprobs]
                assert [record.token_id for record in records] == (tokens_of(deltas) if i % 2 else [])

    run(scene())


def test_a_slow_consumer_gets_merged_deltas_and_loses_nothing() -> None:
    async def scene() -> None:
        async with engine() as client:
            stream = client.submit(request("a", 500, num_prompt_logprobs=0))
            first = await anext(stream)
            assert first.prompt_logprobs is not None
            await until(lambda: client.num_in_flight == 0)
            rest = [delta async for delta in stream]
            assert len(rest) == 1  # all that came meanwhile
            assert tokens_of([first, *rest]) == [(20 + i) % 300 for i in range(1, 501)]

    run(scene())


@pytest.mark.parametrize("way", ["close", "cancel", "drop", "abort"])
def test_leaving_a_stream_early_frees_the_engine(way: str) -> None:
    async def scene() -> None:
        async with engine("fake step_ms=2") as client:
            stream = client.submit(request("a", 100_000))
            await anext(stream)
            if way == "close":
                await stream.aclose()
            elif way == "cancel":
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(last_finish(stream), 0.05)
            elif way == "drop":
                del stream
                gc.collect()
            else:
                assert await client.abort("a") is True
                assert await last_finish(stream) is FinishReason.ABORTED
                assert await client.abort("a") is False
            await until(lambda: client.num_in_flight == 0)
            await until(lambda: client.stats().total_finished == {"aborted": 1})
            assert client.stats().num_running == 0

    run(scene())


def test_a_refused_request_fails_alone() -> None:
    async def scene() -> None:
        async with engine() as client:
            refused, fine = await asyncio.gather(collect(client, request("refuse")), collect(client, request("fine")))
            assert refused[-1].finish is FinishReason.FAILED
            assert refused[-1].error is not None
            assert refused[-1].error.kind == "InvalidRequest"
            assert "999" in refused[-1].error.message
            assert fine[-1].finish is FinishReason.LENGTH

    run(scene())


def test_a_killed_engine_fails_its_requests_retryably_and_comes_back() -> None:
    async def scene() -> None:
        async with engine("fake step_ms=2") as client:
            streams = [asyncio.create_task(collect(client, request(f"r{i}", 100_000))) for i in range(8)]
            load = asyncio.create_task(client.load(AdapterTicket("k", "sql@1", "fine.img", 10)))
            await load
            old_pid = client.pid
            assert old_pid is not None
            os.kill(old_pid, signal.SIGKILL)
            for deltas in await asyncio.gather(*streams):
                assert deltas[-1].finish is FinishReason.FAILED
                assert deltas[-1].error is not None
                assert deltas[-1].error.retryable
            assert client.state is EngineState.RESTARTING
            with pytest.raises(EngineUnavailable):
                client.submit(request("too early"))
            with pytest.raises(EngineUnavailable):
                await client.residency()
            await until(lambda: client.state is EngineState.READY)
            assert client.pid != old_pid
            assert tokens_of(await collect(client, request("again", 3))) == [21, 22, 23]
            assert client.num_restarts == 1

    run(scene())


def test_an_engine_that_hangs_is_found_asked_for_stacks_and_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    async def scene() -> None:
        async with engine(watchdog_s=0.4) as client:
            assert (await collect(client, request("fine")))[-1].finish is FinishReason.LENGTH
            await asyncio.sleep(0.8)
            assert live_now(client) is True  # idle silence means nothing
            deltas = await collect(client, request("hang"))
            assert deltas[-1].finish is FinishReason.FAILED
            assert live_now(client) is False
            await until(lambda: client.state is EngineState.READY)
            assert live_now(client) is True
            assert (await collect(client, request("fine2")))[-1].finish is FinishReason.LENGTH

    run(scene())
    told = capfd.readouterr().err
    assert "fake_engine.py" in told  # the stack names the line that hangs
    assert "_advance" in told


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("fake fail_start=1", "attention is not supported"),
        ("fake broken_start=1", "KeyError"),
        ("fake die_at_start=1", "ended before it was ready"),
    ],
)
def test_an_engine_that_cannot_start_says_why(script: str, words: str) -> None:
    async def scene() -> None:
        with pytest.raises(EngineStartError, match=words):
            async with engine(script):
                pass

    run(scene())


def test_adapters_are_loaded_listed_and_evicted_through_the_door() -> None:
    async def scene() -> None:
        async with engine("fake step_ms=2") as client:
            ticket = AdapterTicket("key", "sql@3", "/store/sql.img", 100)
            assert await client.load(ticket) is AdapterState.DEVICE
            assert [(one.key, one.name) for one in await client.residency()] == [("key", "sql@3")]
            stream = client.submit(request("a", 100_000, adapter=ticket))
            await anext(stream)
            with pytest.raises(AdapterBusy):
                await client.evict("key")
            await stream.aclose()
            assert await client.evict("key") is True
            assert await client.evict("key") is False
            with pytest.raises(AdapterLoadFailed, match="truncated"):
                await client.load(AdapterTicket("bad", "bad@1", "/store/broken.img", 100))
            assert await client.load(ticket) is AdapterState.DEVICE
            assert await client.evict("key") is True
            assert await client.load(ticket) is AdapterState.DEVICE, "the news of its eviction ends no load"

    run(scene())


def test_kept_adapters_are_told_to_the_engine_and_to_the_one_after_it() -> None:
    async def scene() -> None:
        async with engine("fake step_ms=2") as client:
            ticket = AdapterTicket("key", "sql@3", "/store/sql.img", 100)
            await client.keep([ticket])
            assert [one.is_kept for one in await client.residency()] == [True]
            with pytest.raises(NoRoomForAdapter):
                await client.keep([AdapterTicket("b", "huge@1", "/store/huge.img", 100)])
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.num_restarts > 0 and client.state == "ready")
            assert [(one.key, one.is_kept) for one in await client.residency()] == [("key", True)], "not the refused"

    run(scene())


def test_what_is_expected_is_loaded_and_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with engine("fake step_ms=2") as client:
            client.expect(ticket := AdapterTicket("key", "sql@3", "/store/sql.img", 100))
            await until(lambda: client.on_device == {"key"})
            monkeypatch.setattr(client._supervisor, "send", lambda message: pytest.fail(f"sent: {message}"))
            client.expect(ticket)
            monkeypatch.undo()

    run(scene())


def test_draining_finishes_what_runs_and_accepts_nothing_more() -> None:
    async def scene() -> None:
        async with engine("fake step_ms=5") as client:
            running = asyncio.create_task(collect(client, request("a", 20)))
            await asyncio.sleep(0)
            assert await client.drain(timeout_s=0.01) == 1
            with pytest.raises(EngineUnavailable, match="last requests"):
                client.submit(request("late"))
            assert await client.drain(timeout_s=10) == 0
            assert (await running)[-1].finish is FinishReason.LENGTH

    run(scene())


def test_closing_ends_the_process_and_every_request() -> None:
    async def scene() -> None:
        async with engine("fake step_ms=2") as client:
            running = asyncio.create_task(collect(client, request("a", 100_000)))
            await until(lambda: client.stats().num_running == 1)
            pid = client.pid
            await client.close()
            assert (await running)[-1].finish is FinishReason.FAILED
            assert not is_there(pid)
            with pytest.raises(EngineUnavailable):
                client.submit(request("late"))

    run(scene())


def test_an_idle_engine_does_not_spin() -> None:
    async def scene() -> None:
        async with engine() as client:
            await collect(client, request("a"))
            await asyncio.sleep(0.1)
            before_s = cpu_seconds(client.pid)
            await asyncio.sleep(1.0)
            assert cpu_seconds(client.pid) - before_s <= 0.01
            stream = client.submit(request("busy", 1_000_000))
            # The measurement sees work when there is some.
            await until(lambda: cpu_seconds(client.pid) - before_s >= 0.05)
            await stream.aclose()

    run(scene())


def live_now(client: EngineClient) -> bool:
    return client.live


def is_there(pid: int | None) -> bool:
    return Path(f"/proc/{pid}").exists()


def cpu_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_threads_of_the_engine_do_not_spin_for_ever_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(pid: int | None) -> list[bytes]:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")

    async def environment() -> list[bytes]:
        async with engine() as client:
            return read(client.pid)

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert b"GOMP_SPINCOUNT=20000" in asyncio.run(environment())
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert b"GOMP_SPINCOUNT=7" in asyncio.run(environment())
