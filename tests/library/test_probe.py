"""The probe over an engine that answers by successors: what it reads, how it fails, what it leaves behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from peft_core.traits import AdapterTraits
from server.engine.client import EngineClient
from server.engine.config import EngineConfig
from server.engine.launch import in_thread
from server.engine.request import AdapterTicket
from server.library.probe import NO_CHANGE, NUM_TOKENS, Probe
from tests.engine.fake_engine import build_engine
from tests.library.library_samples import in_a_loop


@asynccontextmanager
async def engine() -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(EngineConfig("fake"), launch=in_thread(build_engine))
    try:
        yield client
    finally:
        await client.close()


def ticket(name: str, traits: AdapterTraits | None = None) -> AdapterTicket:
    return AdapterTicket(name, f"{name}@1", f"/{name}.img", 10, traits or AdapterTraits())


@in_a_loop
async def test_an_adapter_that_answers_as_the_base_is_told_to_change_nothing() -> None:
    async with engine() as client:
        report = await Probe(client).add_to({"warnings": ["one"]}, ticket("sql"))
        assert report["probe"] == {"tokens": NUM_TOKENS, "largest_change": 0.0, "mean_change": 0.0}
        assert report["warnings"] == ["one", NO_CHANGE]


@in_a_loop
async def test_the_base_is_asked_once_and_nothing_stays_on_the_device() -> None:
    async with engine() as client:
        probe = Probe(client)
        for name in ("a", "b", "c"):
            await probe.measure(ticket(name))
        assert len(probe._of_base) == 1
        await probe.add_to({"warnings": []}, ticket("d"))
        assert [one.key for one in await client.residency() if one.key.startswith("probe:")] == []
        assert client.num_in_flight == 0


@in_a_loop
async def test_an_adapter_that_waits_for_its_invocation_is_invoked() -> None:
    async with engine() as client:
        called = AdapterTraits(invocation_tokens=(17, 4, 99))
        found = await Probe(client).measure(ticket("sql", called))
        assert found["tokens"] == NUM_TOKENS + 3


@in_a_loop
async def test_a_failure_is_told_and_raises_nothing() -> None:
    async with engine() as client:
        probe = Probe(client)
        report = await probe.add_to({"warnings": []}, ticket("broken"))
        assert "failed" in report["probe"]
        assert report["warnings"] == [f"the probe could not be made: {report['probe']['failed']}"]
        await client.close()
        assert "failed" in (await probe.add_to({"warnings": []}, ticket("sql")))["probe"]
