"""Which failures are mended, how often, and that images are swept while a server runs."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters_store.record import VersionState
from server.engine.client import EngineClient
from server.engine.step import AdapterEvent
from server.front import image_care
from server.front.image_care import ImageCare
from server.library.library import Library


class FakeLibrary:
    """One adapter, "sql", whose only version has the effect "broken"."""

    def __init__(self, num_bytes: int = 0) -> None:
        self.discarded: list[str] = []
        self.sweeps: list[int] = []
        self.swept = threading.Event()
        version = SimpleNamespace(
            name="sql", version=1, state=VersionState.READY, content=SimpleNamespace(effect_digest="broken")
        )
        self.catalog = SimpleNamespace(
            names_using=lambda keys: ["sql"] if "broken" in keys else [],
            record=lambda name: SimpleNamespace(versions=[version]),
            lease=lambda reference: nullcontext(SimpleNamespace(version=version)),
            shelf=SimpleNamespace(discard=self.discarded.append, num_bytes=num_bytes),
            upkeep=SimpleNamespace(sweep_images=self._sweep),
        )

    def _sweep(self, max_bytes: int) -> int:
        self.sweeps.append(max_bytes)
        self.swept.set()
        return 0

    async def ticket(self, version: Any) -> str:
        return f"ticket of {version.name}"


class FakeEngine:
    def __init__(self) -> None:
        self.loaded: list[str] = []

    async def load(self, ticket: str) -> None:
        self.loaded.append(ticket)


async def told(*events: Any, library: FakeLibrary, max_bytes: int = 10) -> tuple[FakeEngine, list[Any]]:
    passed: list[Any] = []
    care, engine = ImageCare(passed.append), FakeEngine()
    care.on_event(AdapterEvent("broken", "sql@1", "failed", "before the start"))
    care.start(cast(EngineClient, engine), cast(Library, library), max_bytes)
    for event in events:
        care.on_event(event)
    await asyncio.sleep(0.2)
    await care.close()
    return engine, passed


def test_a_broken_image_is_removed_packed_again_and_loaded_once() -> None:
    library = FakeLibrary()
    failed = AdapterEvent("broken", "sql@1", "failed", "checksum")
    engine, passed = asyncio.run(told(failed, failed, library=library))
    assert library.discarded == ["broken"], "what fails again at once has another cause"
    assert engine.loaded == ["ticket of sql"]
    assert len(passed) == 3, "every event goes on to whoever listens"


@pytest.mark.parametrize(
    "event", [AdapterEvent("broken", "sql@1", "disk", "budget"), AdapterEvent("unknown", "probe", "failed", "checksum")]
)
def test_what_is_no_failure_of_a_stored_version_changes_nothing(event: AdapterEvent) -> None:
    library = FakeLibrary()
    engine, _ = asyncio.run(told(event, library=library))
    assert library.discarded == engine.loaded == []


def test_images_are_swept_when_they_are_over_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_care, "_SWEEP_EVERY_S", 0.01)
    over, within = FakeLibrary(num_bytes=11), FakeLibrary(num_bytes=10)
    asyncio.run(told(library=over))
    asyncio.run(told(library=within))
    assert over.sweeps
    assert not within.sweeps
