"""What breaks in a step, and whom it takes along."""

from __future__ import annotations

import pytest

from server.engine.errors import StepOutOfMemory
from server.engine.request import FinishReason
from tests.engine.simulated import Bench, Corruption, ask, expected_tokens, ticket


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


def test_a_step_out_of_memory_is_retried_smaller_and_nobody_notices() -> None:
    bench = Bench(max_num_seqs=8, num_units=100)
    bench.runner.max_tokens = 12
    requests = [ask(f"r{i}", list(range(8)), max_new_tokens=6, salt=str(i)) for i in range(8)]
    bench.run(*requests)
    for request in requests:
        assert bench.answers[request.request_id] == expected_tokens(request, 6)
    assert 0 < bench.engine.stats().total_steps_shed <= 2, "after a shortage steps stay small for a while"
    bench.check_idle()


def test_after_a_shortage_the_steps_grow_again() -> None:
    bench = Bench(max_num_seqs=8, num_units=100, max_model_len=300)
    bench.runner.faults = [None, StepOutOfMemory("just once")]
    crowd = [ask(f"r{i}", [1, 2, 3], max_new_tokens=2, salt=str(i)) for i in range(8)]
    bench.run(*crowd)
    assert bench.runner.plans[1].num_tokens == 4, "eight decodes, halved"
    bench.run(ask("quiet", [1], max_new_tokens=200))
    bench.runner.plans.clear()
    bench.run(*[ask(f"s{i}", list(range(8)), max_new_tokens=2, salt=str(i)) for i in range(8)])
    assert bench.runner.plans[0].num_tokens == 32
    assert bench.engine.stats().total_steps_shed == 1


def test_a_chunk_that_does_not_fit_even_alone_fails_alone() -> None:
    bench = Bench()
    bench.runner.max_tokens = 5
    small = ask("small", [1, 2, 3])
    bench.run(ask("large", list(range(8))), small)
    assert bench.ends["large"].error is not None
    assert bench.ends["large"].error.kind == "OutOfMemory"
    assert bench.ends["large"].error.retryable
    assert bench.answers["small"] == expected_tokens(small, 4)
    bench.check_idle()


def test_a_broken_step_fails_its_requests_with_a_retryable_error_and_the_engine_goes_on() -> None:
    bench = Bench(max_num_seqs=2)
    bench.runner.faults = [None, RuntimeError("device lost its mind")]
    third = ask("third", [7, 8, 9])
    bench.run(ask("first", [1, 2, 3]), ask("second", [4, 5, 6]), third)
    for name in ("first", "second"):
        end = bench.ends[name]
        assert end.finish is FinishReason.FAILED
        assert end.error is not None
        assert end.error.retryable
        assert "device lost its mind" in end.error.message
    assert bench.answers["third"] == expected_tokens(third, 4)
    bench.check_idle()


def test_a_row_of_nan_fails_alone_and_leaves_nothing_in_the_cache() -> None:
    bench = Bench()
    good = ask("good", list(range(9)))
    bench.engine.submit(ask("bad", list(range(20, 40)), max_new_tokens=50))
    bench.run_until(lambda: "bad" in bench.answers)
    bench.runner.poisoned = {"bad"}
    bench.run(good)
    assert bench.ends["bad"].error is not None
    assert bench.ends["bad"].error.kind == "InvalidLogits"
    assert len(bench.answers["bad"]) == 1
    assert bench.answers["good"] == expected_tokens(good, 4)
    bench.runner.poisoned = set()
    bench.run(ask("again", list(range(20, 40))))
    assert bench.engine.stats().total_prefix_hits == 0, "K/V of a broken row was found again"
    bench.check_idle()


def test_a_request_that_cannot_join_the_batch_fails_alone() -> None:
    bench = Bench()
    bench.runner.unwelcome = {"bad"}
    good = ask("good", [1, 2, 3], ticket("a"))
    bench.run(ask("bad", [1, 2, 3], ticket("a")), good)
    error = bench.ends["bad"].error
    assert error is not None
    assert (error.kind, error.message) == ("StepFailed", "it could not join the batch: no such bias")
    assert bench.answers["good"] == expected_tokens(good, 4)
    bench.check_idle()


def test_a_prefill_that_breaks_in_its_first_chunk_leaves_nothing_either() -> None:
    bench = Bench(max_num_seqs=1)
    bench.runner.poisoned = {"bad"}
    bench.run(ask("bad", list(range(20, 40))))
    assert bench.answers["bad"] == []
    bench.check_idle()
    assert bench.engine.stats().units_cached == 0


def test_a_planted_leak_of_a_block_is_seen() -> None:
    bench = Bench()
    bench.run(ask("a", [1, 2, 3]))
    bench.engine.check_integrity()
    bench.blocks.allocate(1)
    with pytest.raises(AssertionError, match="other users of blocks"):
        bench.engine.check_integrity()


def test_a_planted_lost_request_is_seen() -> None:
    bench = Bench()
    bench.engine.submit(ask("a", [1, 2, 3]))
    bench.engine.check_integrity()
    (sequence,) = bench.engine._scheduler.waiting
    bench.engine._scheduler.waiting.remove(sequence)
    with pytest.raises(AssertionError, match="lost or kept"):
        bench.engine.check_integrity()


def test_the_simulated_device_notices_a_clobbered_block() -> None:
    bench = Bench()
    bench.engine.submit(ask("a", list(range(9)), max_new_tokens=9))
    bench.step()
    bench.step()
    bench.memory.units[0] = {}
    with pytest.raises(Corruption, match="someone else's"):
        bench.step()
