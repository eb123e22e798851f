"""Arrival, the host tier, kept adapters, what eviction weighs, and the bound of waiting, on a simulated device."""

from __future__ import annotations

import pytest

from server.engine import policy
from server.engine.errors import AdapterBusy, NoRoomForAdapter
from server.engine.request import AdapterState, ResidentAdapter, Tier
from tests.engine.simulated import UNIT_BYTES, Bench, ask, ticket


def settle(bench: Bench) -> None:
    bench.adapters.poll()
    bench.blocks.tick += 1


def use(bench: Bench, name: str, units: int = 2, times: int = 1) -> None:
    """Load it if need be, and let so many sequences run on it, one after the other."""
    for _ in range(times):
        slot = bench.adapters.acquire(ticket(name, units))
        if slot is None:
            settle(bench)
            slot = bench.adapters.acquire(ticket(name, units))
        assert slot is not None
        bench.adapters.release(slot)
        bench.blocks.tick += 1


def here(bench: Bench) -> set[str]:
    return {one.name for one in bench.adapters.residents() if one.state is AdapterState.DEVICE}


def line(bench: Bench, name: str) -> ResidentAdapter:
    return next(one for one in bench.adapters.residents(with_past=True) if one.name == name)


def test_a_request_far_back_in_the_queue_only_warms_its_adapter() -> None:
    bench = Bench(max_num_seqs=1)
    for index in range(20):
        bench.engine.submit(ask(f"r{index}", [1, 2], ticket(f"a{index}", 1)))
    assert bench.reader.started == [ticket(f"a{index}").key for index in range(16)]
    assert bench.reader.warmed == [ticket(f"a{index}").key for index in range(16, 20)]


def test_what_is_expected_is_loaded_once_however_many_ask() -> None:
    bench = Bench()
    bench.engine.expect(ticket("a"))
    bench.engine.expect(ticket("a"))
    bench.run(*[ask(f"r{index}", [1, 2], ticket("a")) for index in range(5)])
    assert bench.reader.started == [ticket("a").key]


def test_an_explicit_load_to_the_host_is_told_and_kept_apart_from_the_device() -> None:
    bench = Bench()
    with pytest.raises(NoRoomForAdapter, match="host-adapter-memory"):
        bench.adapters.load(ticket("a"), Tier.HOST)
    bench.reader.host_room = 10 * UNIT_BYTES
    assert bench.adapters.load(ticket("a"), Tier.HOST) is AdapterState.LOADING
    assert bench.engine.has_work, "somebody has to take over the end of the read"
    settle(bench)
    assert [(event.name, event.state) for event in bench.adapters.take_events()] == [("a", "host")]
    assert bench.adapters.load(ticket("a"), Tier.HOST) is AdapterState.HOST
    assert line(bench, "a").state is AdapterState.HOST
    use(bench, "a")
    assert line(bench, "a").state is AdapterState.DEVICE
    assert line(bench, "a").in_host
    assert bench.adapters.evict(ticket("a").key)
    assert bench.adapters.take_events()[-1].state == "host", "it has not left memory"
    assert bench.adapters.evict(ticket("a").key, Tier.HOST)
    assert not bench.adapters.evict(ticket("a").key, Tier.HOST)
    assert line(bench, "a").state is AdapterState.DISK
    assert "asked" in line(bench, "a").reason


def test_a_broken_image_is_told_by_the_load_to_the_host_too() -> None:
    bench = Bench()
    bench.reader.host_room = 10 * UNIT_BYTES
    bench.reader.broken[ticket("a").key] = "truncated"
    bench.adapters.load(ticket("a"), Tier.HOST)
    settle(bench)
    assert bench.adapters.take_events()[-1].state == "failed"
    assert line(bench, "a").reason == "truncated"


def test_what_is_used_often_outlives_what_was_used_lately() -> None:
    for name, stays in (("weighed", "often"), ("lru", "lately")):
        bench = Bench(num_units=4, worth_of=policy.EVICTION_POLICIES[name])
        use(bench, "often", times=12)
        use(bench, "lately")
        bench.blocks.tick += 5
        use(bench, "new")
        assert here(bench) == {stays, "new"}, name


def test_uses_are_remembered_over_an_eviction() -> None:
    bench = Bench(num_units=4)
    use(bench, "often", times=12)
    assert bench.adapters.evict(ticket("often").key)
    use(bench, "often")
    assert line(bench, "often").num_uses > 12


def test_what_is_dear_to_reload_stays_and_a_copy_in_the_host_makes_cheap() -> None:
    near, far = (policy.worth_by_use(100, 1.0, is_near=is_near) for is_near in (True, False))
    assert near < far
    small, large = (policy.worth_by_use(units, 1.0, is_near=False) / units for units in (1, 100))
    assert small > large, "a unit of a small adapter costs more to bring back"
    assert policy.worth_by_use(10, 8.0, is_near=False) > policy.worth_by_use(10, 2.0, is_near=False)


def test_kept_adapters_are_loaded_and_stay() -> None:
    bench = Bench(num_units=8)
    bench.adapters.keep([ticket("kept")])
    settle(bench)
    assert here(bench) == {"kept"}
    assert line(bench, "kept").is_kept
    for name in "abcdef":
        use(bench, name)
    assert "kept" in here(bench)
    with pytest.raises(AdapterBusy, match="pinned"):
        bench.adapters.evict(ticket("kept").key)
    bench.adapters.check_integrity({})
    bench.adapters.keep([])
    bench.adapters.check_integrity({})
    for name in "abcdef":
        use(bench, name)
    assert "kept" not in here(bench), "no longer kept"


def test_more_than_can_be_kept_is_refused_and_changes_nothing() -> None:
    bench = Bench(num_units=8)
    bench.adapters.keep([ticket("a")])
    with pytest.raises(NoRoomForAdapter, match="pinned"):
        bench.adapters.keep([ticket("b"), ticket("c"), ticket("d")])
    settle(bench)
    assert here(bench) == {"a"}


def test_a_kept_adapter_comes_back_when_there_is_room_again() -> None:
    bench = Bench(num_units=8)
    units = bench.blocks.allocate(8)
    assert units is not None
    bench.adapters.keep([ticket("kept")])
    assert not bench.reader.started
    bench.blocks.release(units)
    settle(bench)
    settle(bench)
    assert here(bench) == {"kept"}


def test_kept_adapters_yield_to_a_request_that_could_otherwise_never_run() -> None:
    bench = Bench(num_units=8, max_model_len=64)
    bench.adapters.keep([ticket("kept", 4)])
    settle(bench)
    bench.run(ask("long", list(range(1, 25)), max_new_tokens=4))
    assert len(bench.answers["long"]) == 4
    assert bench.adapters.evictions["kept"] == 1
    assert here(bench) == {"kept"}, "back with the last of the steps that were due: an idle engine makes none"
    bench.engine.check_integrity()


def test_kept_adapters_come_back_when_whom_they_yielded_to_is_gone_before_it_ran() -> None:
    bench = Bench(num_units=8, max_model_len=64)
    bench.adapters.keep([ticket("kept", 4)])
    settle(bench)
    bench.engine.submit(ask("long", list(range(1, 25)), max_new_tokens=4))
    assert bench.adapters.yield_kept()
    bench.engine.abort("long")
    bench.run()
    use(bench, "a")
    use(bench, "b")
    use(bench, "c")
    assert "kept" in here(bench), "nobody waits for its room"
    bench.engine.check_integrity()


def test_a_step_looks_at_kept_adapters_only_where_they_are_absent() -> None:
    bench = Bench(num_units=32)
    bench.adapters.keep([ticket(name, 1) for name in "abcdefgh"])
    settle(bench)
    assert not bench.adapters._kept.lacking()
    bench.adapters.keep([ticket(name, 1) for name in "abcdefghi"])
    bench.reader.broken[ticket("i").key] = "truncated"
    settle(bench)
    assert [one.name for one in bench.adapters._kept.lacking()] == ["i"]
    bench.adapters.check_integrity({})


def test_an_eviction_on_an_idle_engine_is_told() -> None:
    bench = Bench()
    use(bench, "a")
    bench.run()
    bench.adapters.evict(ticket("a").key)
    bench.run()
    assert [event.reason for event in bench.outputs[-1].adapter_events] == ["asked"]


def test_the_budget_gives_up_an_older_adapter_rather_than_a_cheaper_one_of_this_step() -> None:
    bench = Bench(num_units=16, max_adapter_bytes=6 * UNIT_BYTES)
    use(bench, "dear", 2, times=12)
    use(bench, "next", 4)
    bench.adapters.prefetch(ticket("next", 4))  # its turn is soon: used in this step
    bench.adapters.prefetch(ticket("new", 2))
    settle(bench)
    assert here(bench) == {"next", "new"}


def _most_overtaken(bound: int) -> int:
    """How many younger requests run before one whose adapter is thrown out, for 30 steps, as soon as it is there."""
    bench = Bench(num_units=16, max_num_seqs=2, max_pass_over_steps=bound)
    poll = bench.adapters.poll

    def poll_and_lose() -> None:
        poll()
        if bench.blocks.tick < 30 and "victim" in here(bench):
            bench.adapters.evict(ticket("victim").key)

    bench.adapters.poll = poll_and_lose  # type: ignore[method-assign]
    bench.engine.submit(ask("victim", [1, 2, 3], ticket("victim", 10)))
    for index in range(40):
        bench.engine.submit(ask(f"young {index}", [1], max_new_tokens=1))
        bench.step()
    return bench.runner.admitted.index(1)


def test_one_whose_adapter_is_thrown_out_again_and_again_holds_the_younger_in_the_end() -> None:
    assert _most_overtaken(bound=8) <= 10
    assert _most_overtaken(bound=1000) >= 25, "the control: without a bound they all pass it"
