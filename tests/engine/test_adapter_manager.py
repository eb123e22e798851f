"""Residency: loads, pins, slots, evictions and failures, on a simulated reader."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from server.engine.adapter_records import RETRY_FAILED_AFTER_S
from server.engine.errors import AdapterBusy, AdapterLoadFailed, AdapterTooLarge, NoRoomForAdapter
from server.engine.request import AdapterState
from tests.engine.simulated import UNIT_BYTES, Bench, ask, ticket


def settle(bench: Bench) -> None:
    """Let the loads end, and time pass."""
    bench.adapters.poll()
    bench.blocks.tick += 1


def make_resident(bench: Bench, *names: str, units: int = 2) -> None:
    for name in names:
        assert bench.adapters.acquire(ticket(name, units)) is None
        settle(bench)


def states(bench: Bench) -> dict[str, str]:
    return {resident.name: resident.state.value for resident in bench.adapters.residents()}


def test_an_adapter_is_loaded_once_and_then_pinned_by_all_who_ask() -> None:
    bench = Bench()
    assert bench.adapters.acquire(ticket("a")) is None
    assert bench.adapters.acquire(ticket("a")) is None
    assert bench.reader.started == [ticket("a").key], "one flight for all who wait"
    assert states(bench) == {"a": "loading"}
    settle(bench)
    slot = bench.adapters.acquire(ticket("a"))
    assert slot == bench.adapters.acquire(ticket("a")) == 0
    assert bench.adapters.residents()[0].num_pins == 2
    assert bench.memory.bound[0] == (ticket("a").key, 62)
    bench.adapters.check_integrity({ticket("a").key: 2})


def test_slots_are_distinct_and_reused_lowest_first() -> None:
    bench = Bench()
    make_resident(bench, "a", "b", "c")
    assert [bench.adapters.acquire(ticket(name)) for name in "abc"] == [0, 1, 2]
    bench.adapters.release(0)
    assert bench.adapters.evict(ticket("a").key)
    make_resident(bench, "d")
    assert bench.adapters.acquire(ticket("d")) == 0


def test_the_least_recently_used_unpinned_adapter_goes_when_room_is_needed() -> None:
    bench = Bench(num_units=6)
    make_resident(bench, "a", "b", "c")
    slot = bench.adapters.acquire(ticket("a"))
    assert slot is not None
    make_resident(bench, "d")
    assert states(bench) == {"a": "device", "c": "device", "d": "device"}
    bench.adapters.check_integrity({ticket("a").key: 1})
    bench.adapters.release(slot)
    settle(bench)
    make_resident(bench, "e")
    assert "c" not in states(bench), "a was used after it"


def test_pinned_adapters_stay_and_the_newcomer_waits() -> None:
    bench = Bench(num_units=4)
    make_resident(bench, "a", "b")
    slots = [bench.adapters.acquire(ticket(name)) for name in "ab"]
    bench.blocks.tick += 1
    assert bench.adapters.acquire(ticket("c")) is None
    assert bench.adapters.load_started(ticket("c").key) is None
    assert slots[0] is not None
    bench.adapters.release(slots[0])
    bench.blocks.tick += 1
    assert bench.adapters.acquire(ticket("c")) is None
    assert bench.adapters.load_started(ticket("c").key) is not None


def test_a_budget_of_bytes_bounds_all_adapters_together() -> None:
    bench = Bench(max_adapter_bytes=5 * UNIT_BYTES)
    make_resident(bench, "a", "b", "c")
    assert states(bench) == {"b": "device", "c": "device"}
    assert bench.adapters.evictions == {"budget": 1}
    with pytest.raises(AdapterTooLarge, match=r"600 bytes .* at most 500"):
        bench.adapters.load(ticket("large", 6))
    bench.adapters.check_integrity({})


def test_an_image_of_any_size_takes_whole_units_and_at_least_one() -> None:
    bench = Bench()
    sizes = [0, 1, UNIT_BYTES, UNIT_BYTES + 1]
    tickets = [replace(ticket("x"), num_bytes=num_bytes) for num_bytes in sizes]
    assert [bench.adapters.units_of(sized) for sized in tickets] == [1, 1, 1, 2]


def test_eviction_on_request_gives_the_units_back_and_is_refused_while_in_use() -> None:
    bench = Bench()
    assert not bench.adapters.evict(ticket("a").key), "not there"
    assert bench.adapters.load(ticket("a")) is AdapterState.LOADING
    with pytest.raises(AdapterBusy, match="being loaded"):
        bench.adapters.evict(ticket("a").key)
    settle(bench)
    assert bench.adapters.load(ticket("a")) is AdapterState.DEVICE
    slot = bench.adapters.acquire(ticket("a"))
    with pytest.raises(AdapterBusy, match="1 running"):
        bench.adapters.evict(ticket("a").key)
    assert slot is not None
    bench.adapters.release(slot)
    assert bench.adapters.evict(ticket("a").key)
    assert bench.blocks.num_free == 64
    assert bench.memory.bound == {}
    bench.adapters.check_integrity({})


def test_an_explicit_load_says_when_there_is_no_room_now() -> None:
    bench = Bench(num_units=4)
    make_resident(bench, "a", units=4)
    slot = bench.adapters.acquire(ticket("a", 4))
    bench.blocks.tick += 1
    with pytest.raises(NoRoomForAdapter, match="2 contiguous units"):
        bench.adapters.load(ticket("b"))
    assert slot is not None
    bench.adapters.release(slot)
    bench.blocks.tick += 1
    assert bench.adapters.load(ticket("b")) is AdapterState.LOADING


@pytest.mark.parametrize("how", ["read", "bind"])
def test_a_broken_image_fails_and_is_tried_again_after_a_while_or_when_asked(how: str) -> None:
    bench = Bench()
    key = ticket("a").key
    if how == "read":
        bench.reader.broken[key] = "truncated at byte 12"
    else:
        bench.residency.refuses.add(key)
    make_resident(bench, "a")
    assert bench.blocks.num_free == 64, "its units are free again"
    with pytest.raises(AdapterLoadFailed, match=r"truncated|wrong shape"):
        bench.adapters.acquire(ticket("a"))
    (failed,) = bench.adapters.residents()
    assert failed.state is AdapterState.FAILED
    assert "truncated" in failed.reason or "wrong shape" in failed.reason
    bench.adapters.check_integrity({})
    bench.clock.now += RETRY_FAILED_AFTER_S
    make_resident(bench, "a")
    with pytest.raises(AdapterLoadFailed):
        bench.adapters.acquire(ticket("a"))
    bench.reader.broken.clear()
    bench.residency.refuses.clear()
    assert bench.adapters.load(ticket("a")) is AdapterState.LOADING, "asked explicitly: at once"
    settle(bench)
    assert bench.adapters.acquire(ticket("a")) == 0
    assert bench.adapters.num_load_failures == 2


def test_changes_of_residency_are_told_as_events() -> None:
    bench = Bench(num_units=4)
    bench.reader.broken[ticket("bad").key] = "no such file"
    make_resident(bench, "a", "bad")
    make_resident(bench, "large", units=4)
    told = [(event.name, event.state, event.reason) for event in bench.adapters.take_events()]
    assert told == [
        ("a", "device", ""),
        ("bad", "failed", "no such file"),
        ("a", "disk", "adapter"),
        ("large", "device", ""),
    ]
    assert bench.adapters.take_events() == []


def test_blocks_may_take_the_room_of_idle_adapters_and_the_slot_is_unbound() -> None:
    bench = Bench(num_units=8)
    make_resident(bench, "a")
    assert bench.blocks.allocate(8) is not None
    assert states(bench) == {}
    assert bench.memory.bound == {}
    assert bench.adapters.evictions == {"kv": 1}
    bench.adapters.check_integrity({})


def test_failures_are_remembered_in_bounded_number() -> None:
    bench = Bench()
    for i in range(1100):
        bench.reader.broken[ticket(f"bad {i}").key] = "broken"
        make_resident(bench, f"bad {i}")
    assert len(bench.adapters.residents()) == 1024


def _visits_per_step(num_others: int) -> float:
    """Records visited a step by 8 sequences on 8 adapters beside many that are resident or were once."""
    bench = Bench(num_units=700, max_model_len=200)
    for i in range(num_others):
        make_resident(bench, f"other {i}")
    names = [f"in use {i}" for i in range(8)]
    for name in names:
        bench.engine.submit(ask(name, [1, 2, 3], ticket(name), max_new_tokens=150))
    bench.run_until(lambda: bench.engine.stats().num_running == 8)
    before = bench.adapters.num_records_visited
    for _ in range(20):
        bench.step()
    assert bench.engine.stats().num_running == 8
    return (bench.adapters.num_records_visited - before) / 20


def test_no_work_of_a_step_grows_with_the_number_of_adapters() -> None:
    assert _visits_per_step(0) == _visits_per_step(300) == 0


def test_the_work_of_a_request_does_not_grow_with_the_number_of_adapters() -> None:
    visits = []
    for num_others in (0, 300):
        bench = Bench(num_units=700)
        make_resident(bench, *[f"other {i}" for i in range(num_others)])
        before = bench.adapters.num_records_visited
        bench.run(*[ask(f"r{i}", [1, 2, 3], ticket(f"in use {i}")) for i in range(8)])
        visits.append(bench.adapters.num_records_visited - before)
    assert visits[0] == visits[1] > 0


@pytest.mark.parametrize("harm", ["pin", "unit", "slot", "idle"])
def test_every_planted_fault_is_seen(harm: str) -> None:
    bench = Bench()
    make_resident(bench, "a", "b")
    slot = bench.adapters.acquire(ticket("a"))
    pins = {ticket("a").key: 1}
    bench.adapters.check_integrity(pins)
    if harm == "pin":
        bench.adapters.acquire(ticket("a"))
    elif harm == "unit":
        bench.blocks.take_run(1)
    elif harm == "slot":
        bench.adapters._device.slots._records[slot or 0] = None
    else:
        bench.adapters._device._idle.clear()
    with pytest.raises(AssertionError, match="adapters:"):
        bench.adapters.check_integrity(pins)


def test_units_in_use_by_blocks_are_never_given_to_an_adapter() -> None:
    bench = Bench(num_units=8)
    units = bench.blocks.allocate(8)
    assert units is not None
    assert bench.adapters.acquire(ticket("a")) is None
    assert bench.reader.started == []
    bench.blocks.release(np.asarray(units[4:]))
    assert bench.adapters.acquire(ticket("a")) is None
    assert bench.reader.started == [ticket("a").key]
