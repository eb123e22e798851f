"""Who runs when: passing over, age, prefetching and order, seen through the engine's door."""

from __future__ import annotations

import pytest

from server.engine.request import FinishReason
from tests.engine.simulated import Bench, ask, expected_tokens, ticket


def planned(bench: Bench) -> list[list[str]]:
    return [[sequence.request_id for sequence in plan.sequences] for plan in bench.runner.plans]


def test_who_waits_for_an_adapter_is_passed_over() -> None:
    bench = Bench()
    bench.reader.latency = 5
    bench.run(ask("cold", [1, 2], ticket("a"), max_new_tokens=1), ask("base", [3, 4], max_new_tokens=3))
    assert planned(bench)[:3] == [["base"], ["base"], ["base"]]
    assert planned(bench)[-1] == ["cold"]


def test_running_streams_keep_their_pace_while_an_adapter_loads() -> None:
    bench = Bench()
    bench.engine.submit(ask("stream", [1], max_new_tokens=60))
    bench.step()
    bench.reader.latency = 21
    bench.engine.submit(ask("cold", [1, 2], ticket("a")))
    assert bench.reader.started, "its load begins when it arrives, not when it is looked at"
    for _ in range(20):
        assert bench.step().request_ids == ["stream"]
    assert bench.engine.stats().num_waiting_for_adapter == 1


def test_waiting_for_loads_alone_computes_nothing_and_says_so() -> None:
    bench = Bench()
    bench.reader.latency = 4
    bench.engine.submit(ask("cold", [1, 2], ticket("a")))
    assert [bench.step().num_tokens for _ in range(4)] == [0, 0, 0, 2]


def test_more_adapters_than_fit_are_all_served() -> None:
    bench = Bench(num_units=24, max_num_seqs=4)
    requests = [ask(f"r{i}", [1, 2, i], ticket(f"adapter {i % 10}", 6), max_new_tokens=7) for i in range(40)]
    bench.run(*requests)
    for request in requests:
        assert bench.answers[request.request_id] == expected_tokens(request, 7)
    assert bench.engine.stats().total_adapter_evictions["adapter"] > 0
    bench.check_idle()


def test_requests_on_one_adapter_share_one_load() -> None:
    bench = Bench(num_units=12, max_num_seqs=2)
    names = ["a", "b"] * 6
    bench.run(*[ask(f"r{i}", [1, 2, i], ticket(name, 3), max_new_tokens=3) for i, name in enumerate(names)])
    assert bench.engine.stats().total_adapter_loads == 2


def _younger_admitted_before(max_pass_over_steps: int) -> int:
    """A large adapter needs room that a stream of small requests keeps occupied: how many overtake it?"""
    bench = Bench(num_units=20, max_num_seqs=4, max_pass_over_steps=max_pass_over_steps)
    for i in range(3):
        bench.engine.submit(ask(f"early {i}", [1, 2, i], max_new_tokens=6 + 4 * i, salt=str(i)))
    bench.step()
    bench.engine.submit(ask("large", [1, 2, 3], ticket("large", 18), max_new_tokens=2))
    for i in range(200):
        if bench.engine.stats().num_waiting < 3:
            bench.engine.submit(ask(f"late {i}", [1, 2, i % 60], max_new_tokens=9, salt=str(i)))
        bench.step()
        if "large" in bench.answers:
            break
    overtaking = len({arrival for arrival in bench.runner.admitted if arrival > 4})
    bench.run()
    assert bench.ends["large"].finish is FinishReason.LENGTH
    bench.check_idle()
    return overtaking


def test_after_its_age_bound_nothing_younger_is_admitted_before_a_request_that_lacks_room() -> None:
    bounded, unbounded = _younger_admitted_before(8), _younger_admitted_before(10_000)
    assert bounded <= 8
    assert unbounded > 20, "the control: without a bound it is overtaken as long as others come"


def test_a_request_that_lacks_blocks_holds_its_place() -> None:
    bench = Bench(num_units=10, max_num_seqs=4)
    bench.engine.submit(ask("running", list(range(20)), max_new_tokens=6))
    bench.step()
    bench.engine.submit(ask("large", list(range(30, 60)), max_new_tokens=2))
    bench.engine.submit(ask("small", [1], max_new_tokens=2))
    bench.run()
    assert bench.runner.admitted == [1, 2, 3]


def test_a_preempted_request_returns_to_the_place_of_its_arrival() -> None:
    bench = Bench(num_units=8, max_num_seqs=2)
    requests = [ask(f"r{i}", [i, 1, 2], max_new_tokens=24, salt=str(i)) for i in range(3)]
    bench.run(*requests)
    assert bench.engine.stats().total_preemptions > 0
    assert list(bench.ends) == ["r0", "r1", "r2"]
    assert bench.runner.admitted[-1] == 3


def test_a_broken_adapter_fails_its_own_requests_only() -> None:
    bench = Bench()
    bench.reader.broken[ticket("bad").key] = "tensor up of layer 0 is truncated"
    good = [ask(f"good {i}", [1, 2, i], ticket("good")) for i in range(3)]
    bad = [ask(f"bad {i}", [1, 2, i], ticket("bad")) for i in range(3)]
    bench.run(*good, *bad)
    for request in good:
        assert bench.answers[request.request_id] == expected_tokens(request, 4)
    for request in bad:
        error = bench.ends[request.request_id].error
        assert error is not None
        assert (error.kind, error.retryable) == ("AdapterLoadFailed", False)
        assert "truncated" in error.message
    bench.check_idle()


def test_while_the_batch_is_full_the_next_adapters_are_loaded() -> None:
    bench = Bench(max_num_seqs=1)
    bench.engine.submit(ask("running", [1], max_new_tokens=10))
    bench.step()
    bench.engine.submit(ask("next", [1], ticket("a"), max_new_tokens=1))
    bench.run()
    names = [name for step in planned(bench) for name in step]
    assert names == ["running"] * 10 + ["next"]
    assert len(bench.outputs) == 11, "no step was lost on the load"


def test_a_failed_load_fails_waiting_requests_even_while_the_batch_is_full() -> None:
    bench = Bench(max_num_seqs=1)
    bench.reader.broken[ticket("bad").key] = "broken"
    bench.engine.submit(ask("running", [1], max_new_tokens=100))
    bench.step()
    bench.engine.submit(ask("bad", [1], ticket("bad")))
    bench.step()
    bench.step()
    assert list(bench.ends) == ["bad"]


def test_nobody_is_admitted_only_to_be_preempted_at_once() -> None:
    bench = Bench(num_units=8, max_num_seqs=2)
    bench.engine.submit(ask("old", list(range(16)), max_new_tokens=10))
    bench.step()
    bench.engine.submit(ask("young", list(range(30, 45)), max_new_tokens=2))
    bench.run()
    assert bench.engine.stats().total_preemptions == 0
    assert list(bench.ends) == ["old", "young"]


@pytest.mark.parametrize(("num_units", "max_adapter_bytes"), [(12, None), (64, 1000)], ids=["pool", "budget"])
def test_an_adapter_loaded_for_the_next_is_not_thrown_out_by_those_behind(
    num_units: int, max_adapter_bytes: int | None
) -> None:
    bench = Bench(num_units=num_units, max_num_seqs=1, max_adapter_bytes=max_adapter_bytes)
    bench.engine.submit(ask("running", [1], max_new_tokens=20))
    bench.step()
    for i in range(8):
        bench.engine.submit(ask(f"r{i}", [1], ticket(f"adapter {i}", 5), max_new_tokens=1))
    bench.run_until(lambda: "r0" in bench.ends)
    assert bench.reader.started.count(ticket("adapter 0").key) == 1
    bench.run()
    assert len(bench.reader.started) <= 16
    bench.check_idle()


def test_evicting_an_adapter_under_waiting_requests_only_delays_them() -> None:
    bench = Bench(max_num_seqs=1)
    waiting = ask("waiting", [1, 2], ticket("a"))
    bench.engine.submit(ask("running", [1], max_new_tokens=10))
    bench.engine.submit(waiting)
    for _ in range(4):
        bench.step()
    assert bench.engine.evict(ticket("a").key)
    bench.run()
    assert bench.answers["waiting"] == expected_tokens(waiting, 4)
    assert bench.engine.stats().total_adapter_loads == 2


@pytest.mark.parametrize("budget", [8, 9, 16, 64])
def test_answers_do_not_depend_on_the_budget(budget: int) -> None:
    bench = Bench(budget=budget, chunk_size=8, num_units=100)
    requests = [ask(f"r{i}", list(range(i * 5 + 1)), ticket(f"a{i % 3}"), max_new_tokens=9) for i in range(8)]
    bench.run(*requests)
    for request in requests:
        assert bench.answers[request.request_id] == expected_tokens(request, 9)
