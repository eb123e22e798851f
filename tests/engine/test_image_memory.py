"""The reader and the host tier on real files and real memory: what is held, what it costs, and that it comes back."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from peft_core.image import PACKER_VERSION, Image, write_image
from server.engine.host_images import HostImages
from server.engine.image_reader import PoolReader
from server.engine.request import AdapterState, AdapterTicket, Tier
from server.engine.step import ImageRead
from tests.tiny_engine import TinyEngine
from tests.tiny_models import make_lora, make_model

MIB = 1 << 20
UNIT_BYTES = 4096


def image(directory: Path, name: str, num_bytes: int) -> AdapterTicket:
    payload = torch.full((num_bytes // 4,), float(len(name)))
    path = directory / f"{name}.img"
    write_image(
        path, Image({"packer_version": PACKER_VERSION, "num_bytes": num_bytes, "sites": [], "parts": {}}, payload)
    )
    return AdapterTicket(name, name, str(path), num_bytes)


def wait(reader: PoolReader) -> ImageRead:
    for _ in range(2000):
        if reads := reader.poll():
            assert len(reads) == 1
            return reads[0]
        time.sleep(0.002)
    raise AssertionError("the read does not end")


def make_reader(host_bytes: int, pool_bytes: int = MIB) -> tuple[PoolReader, torch.Tensor]:
    pool = torch.zeros(pool_bytes, dtype=torch.uint8)
    return PoolReader(pool, UNIT_BYTES, HostImages(host_bytes)), pool


def load(reader: PoolReader, ticket: AdapterTicket, first_unit: int = 0) -> ImageRead:
    reader.start(ticket, first_unit, -(-ticket.num_bytes // UNIT_BYTES))
    return wait(reader)


@pytest.mark.parametrize("host_bytes", [0, 64 * UNIT_BYTES])
def test_a_load_fills_its_units_and_tells_how_long_each_phase_took(tmp_path: Path, host_bytes: int) -> None:
    reader, pool = make_reader(host_bytes)
    ticket = image(tmp_path, "a", 2 * UNIT_BYTES)
    read = load(reader, ticket, first_unit=3)
    assert read.error is None
    assert set(read.phases_s) == {"queue", "read", "check"} | ({"copy"} if host_bytes else set())
    elements = pool.view(torch.float32)
    assert bool((elements[3 * 1024 : 5 * 1024] == 1.0).all())
    assert not bool(elements[: 3 * 1024].any())
    assert not bool(elements[5 * 1024 :].any())


def test_from_the_host_tier_nothing_is_read(tmp_path: Path) -> None:
    reader, pool = make_reader(64 * UNIT_BYTES)
    ticket = image(tmp_path, "a", 2 * UNIT_BYTES)
    assert reader.warm(ticket)
    assert wait(reader).is_for_host
    Path(ticket.image_path).unlink()
    read = load(reader, ticket)
    assert read.error is None
    assert "read" not in read.phases_s
    assert bool((pool.view(torch.float32)[: 2 * 1024] == 1.0).all())
    assert reader.drop("a")
    assert not reader.drop("a")
    assert "No such file" in str(load(reader, ticket).error), "the control: without the copy the file is needed"


def test_without_a_host_tier_warming_is_the_page_caches_business(tmp_path: Path) -> None:
    reader, _ = make_reader(0)
    ticket = image(tmp_path, "a", 2 * UNIT_BYTES)
    assert not reader.warm(ticket)
    assert not reader.warm(replace(ticket, image_path="/nowhere/at.all"))
    assert load(reader, ticket).error is None, "the thread goes on"
    assert reader.host.num_bytes == 0


def test_a_load_goes_before_what_is_only_warmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, _ = make_reader(64 * UNIT_BYTES)
    tickets = [image(tmp_path, f"w{index}", 4 * UNIT_BYTES) for index in range(4)]
    urgent = image(tmp_path, "urgent", UNIT_BYTES)
    may_go, do = threading.Event(), reader._do

    def do_when_it_may(*job: Any) -> None:
        may_go.wait(10)
        do(*job)

    monkeypatch.setattr(reader, "_do", do_when_it_may)
    for ticket in tickets:
        reader.warm(ticket)
    reader.start(urgent, 0, 1)
    may_go.set()
    order: list[str] = []
    while len(order) < 5:
        order += [read.key for read in reader.poll()]
    assert order.index("urgent") <= 1, "only the one that had begun goes before it"


def test_the_host_tier_never_holds_more_than_its_budget(tmp_path: Path) -> None:
    reader, _ = make_reader(10 * UNIT_BYTES)
    for index in range(12):
        load(reader, image(tmp_path, f"a{index}", 3 * UNIT_BYTES))
        assert reader.host.num_bytes <= 10 * UNIT_BYTES
    assert len(reader.host_images()) == 3
    assert reader.host.num_evictions == 9
    assert load(reader, image(tmp_path, "large", 11 * UNIT_BYTES)).error is None, "it passes the tier by"
    assert not reader.is_in_host("large")


def test_a_damaged_image_does_not_get_into_the_host_tier(tmp_path: Path) -> None:
    reader, _ = make_reader(64 * UNIT_BYTES)
    ticket = image(tmp_path, "a", 2 * UNIT_BYTES)
    content = bytearray(Path(ticket.image_path).read_bytes())
    content[-1] ^= 1
    Path(ticket.image_path).write_bytes(content)
    reader.warm(ticket)
    assert "checksum" in str(wait(reader).error)
    assert not reader.is_in_host("a")
    assert reader.host.num_bytes == 0


def test_a_thousand_loads_and_evictions_leave_nothing_behind(tmp_path: Path) -> None:
    """Device units, slots, descriptors and the process's own memory are where they began."""
    model = make_model("qwen2")
    engine = TinyEngine(model, tmp_path, pool_bytes=8 * MIB, host_adapter_bytes=2 * MIB)
    held = [engine.add(f"a{seed}", make_lora(model, tmp_path / f"a{seed}", rank=16, seed=seed)) for seed in range(4)]

    def cycle(ticket: AdapterTicket) -> None:
        while engine.engine.load(ticket) is AdapterState.LOADING or engine.engine.has_work:
            engine.engine.step()
        assert engine.engine.evict(ticket.key)
        engine.engine.evict(ticket.key, Tier.HOST)
        engine.engine.step()

    for index in range(100):  # caches of the allocator and tables reach their size
        cycle(held[index % 4])
    process, before = psutil.Process(os.getpid()), engine.engine.stats()
    rss_before = process.memory_info().rss
    for index in range(1000):
        cycle(held[index % 4])
    after = engine.engine.stats()
    assert after.total_adapter_loads - before.total_adapter_loads == 1000
    assert after.units_free == before.units_free == after.num_units
    assert after.num_adapters_resident == 0
    residency = engine.engine._adapters._device._residency
    assert residency.num_bytes == residency.num_resident == 0  # type: ignore[attr-defined]
    assert engine.engine._adapters.reader.host_images() == []
    assert process.memory_info().rss - rss_before < 8 * MIB, "1,000 images would be more than 100 MB"
    engine.engine.check_integrity()
