"""Virtual tokens, tasks and invocations in the schedule: on a simulated device, through the engine's door."""

from __future__ import annotations

import numpy as np
import pytest

from server.engine.errors import InvalidRequest, RequestTooLong
from server.engine.request import FinishReason
from tests.engine.simulated import BLOCK_SIZE, Bench, ask, expected_tokens, ticket

PROMPTED = ticket("prompted", num_virtual_tokens=10, first_position=10)
TASKS = ticket("tasks", num_virtual_tokens=10, first_position=10, num_tasks=3)
INVOKED = ticket("invoked", invocation_tokens=(50, 51))
WIDE = ticket("wide", vocab_size=70)


def test_virtual_tokens_are_chunked_and_answered_like_any_other() -> None:
    bench = Bench(chunk_size=4)
    request = ask("a", [1, 2, 3], PROMPTED, max_new_tokens=5)
    bench.run(request, ask("base", [1, 2, 3]))
    assert bench.answers["a"] == expected_tokens(request, 5) != expected_tokens(ask("a", [1, 2, 3]), 5)
    chunks = [(int(p.starts[i]), int(p.counts[i])) for p in bench.runner.plans for i, s in enumerate(p.sequences)
              if s.request_id == "a" and p.counts[i] > 1]  # fmt: skip
    assert chunks == [(0, 4), (4, 4), (8, 4)]
    bench.check_idle()


def test_the_second_request_finds_the_virtual_tokens_computed_and_is_told_of_real_ones_only() -> None:
    bench = Bench()
    bench.run(ask("a", [1, 2, 3], PROMPTED))
    computed = len(bench.runner.plans)
    bench.run(ask("b", [4, 5, 6, 7, 8, 9], PROMPTED))
    assert int(bench.runner.plans[computed].starts[0]) == 8, "two of the three blocks of virtual tokens are whole"
    first = next(delta for output in bench.outputs for delta in output.special if delta.request_id == "b")
    assert first.num_cached_tokens == 0
    assert bench.engine.stats().total_prefix_hits == 0
    assert bench.engine.stats().total_prompt_tokens == 9
    bench.run(ask("c", [4, 5, 6, 7, 8, 9], PROMPTED))
    first = next(delta for output in bench.outputs for delta in output.special if delta.request_id == "c")
    assert first.num_cached_tokens == 2, "blocks of twelve tokens, ten of them virtual"


def test_tasks_do_not_share_blocks() -> None:
    bench = Bench()
    starts = []
    for index, task in enumerate((0, 1, 2, 0)):
        request = ask(f"{index}", [1, 2, 3], TASKS, task_id=task)
        num_plans = len(bench.runner.plans)
        bench.run(request)
        assert bench.answers[f"{index}"] == expected_tokens(request, 4)
        starts.append(int(bench.runner.plans[num_plans].starts[0]))
    assert starts == [0, 0, 0, 12], "only the fourth request finds its task's blocks"


@pytest.mark.parametrize("task_id", [None, -1, 3])
def test_a_task_that_is_missing_or_out_of_range_is_refused(task_id: int | None) -> None:
    with pytest.raises(InvalidRequest, match=f"task_id is {task_id}, and must be 0 to 2: tasks was trained on 3 tasks"):
        Bench().engine.submit(ask("a", [1], TASKS, task_id=task_id))


@pytest.mark.parametrize(("adapter", "name"), [(None, "the base"), (PROMPTED, "prompted")])
def test_a_task_without_tasks_is_refused(adapter: object, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"left out: {name} has no tasks"):
        Bench().engine.submit(ask("a", [1], adapter, task_id=0))  # type: ignore[arg-type]


def test_virtual_tokens_take_room_of_the_length() -> None:
    bench = Bench(max_model_len=20)
    request = ask("fits", [1] * 9, PROMPTED, max_new_tokens=50)
    bench.run(request)
    assert len(bench.answers["fits"]) == 1
    assert bench.ends["fits"].finish is FinishReason.LENGTH
    with pytest.raises(RequestTooLong, match=r"10 tokens after the adapter's 10 virtual .* to at most 9 tokens"):
        bench.engine.submit(ask("long", [1] * 10, PROMPTED))
    with pytest.raises(RequestTooLong, match="Use another adapter"):
        Bench(max_model_len=10).engine.submit(ask("never", [1], PROMPTED))


def test_prompt_log_probabilities_are_those_of_the_prompt() -> None:
    bench = Bench(chunk_size=4)
    bench.run(ask("a", [1, 2, 3, 4, 5, 6], PROMPTED, num_prompt_logprobs=0))
    told = [delta.prompt_logprobs for output in bench.outputs for delta in output.special if delta.prompt_logprobs]
    assert [record and record.token_id for record in told[0] or ()] == [None, 2, 3, 4, 5, 6]


def test_a_preempted_sequence_with_virtual_tokens_goes_on_as_before() -> None:
    bench = Bench(num_units=17, max_num_seqs=6)
    requests = [ask(f"r{i}", [1, 2, i], PROMPTED, max_new_tokens=20) for i in range(4)]
    bench.run(*requests)
    assert bench.engine.stats().total_preemptions > 0
    for request in requests:
        assert bench.answers[request.request_id] == expected_tokens(request, 20)
    bench.check_idle()


def test_many_prefixes_do_not_fill_the_pool_for_good() -> None:
    bench = Bench(num_units=24, max_model_len=60)
    for index in range(40):
        adapter = ticket(f"p{index}", 1, num_virtual_tokens=16, has_prefix=True)
        bench.run(ask(f"r{index}", [1, 2], adapter, max_new_tokens=2))
        stats = bench.engine.stats()
        assert stats.units_kv == 0, "an unused prefix is in nobody's use"
    request = ask("large", [1] * 50, max_new_tokens=9)
    bench.run(request)
    assert bench.answers["large"] == expected_tokens(request, 9)
    assert bench.engine.stats().total_kv_evictions > 0
    bench.check_idle()


def test_an_invocation_in_the_middle_of_a_chunk_and_of_a_block() -> None:
    prompt = [*range(13), 50, 51, 1, 2, 3]
    bench = Bench()
    request = ask("a", prompt, INVOKED, max_new_tokens=6)
    bench.run(request, ask("absent", prompt[:13], INVOKED), ask("base", prompt[:13]))
    assert bench.answers["a"] == expected_tokens(request, 6) != expected_tokens(ask("b", prompt), 6)
    assert bench.answers["absent"] == bench.answers["base"]
    bench.check_idle()


def test_blocks_before_an_invocation_are_shared_with_the_base_and_with_other_adapters() -> None:
    prompt = [*range(13), 50, 51, 1, 2, 3]
    bench = Bench()
    bench.run(ask("base", prompt))
    other = ticket("other", invocation_tokens=(50,))
    bench.run(ask("a", prompt, INVOKED), ask("b", prompt, other), ask("stranger", prompt, INVOKED, salt="x"))
    cached = {
        d.request_id: d.num_cached_tokens for o in bench.outputs for d in o.special if d.token_ids and not d.finish
    }
    assert cached == {"base": 0, "a": 12, "b": 12, "stranger": 0}
    bench.run(ask("again", prompt, INVOKED))
    for name, adapter in (("a", INVOKED), ("b", other), ("again", INVOKED)):
        assert bench.answers[name] == expected_tokens(ask(name, prompt, adapter), 4)
    bench.check_idle()


def test_an_absent_invocation_loads_no_adapter() -> None:
    bench = Bench()
    bench.run(ask("a", [1, 2, 3], INVOKED))
    assert bench.reader.started == []


def test_what_is_generated_invokes_nothing() -> None:
    """The answer holds the invocation; the adapter stays where it was, and so do the names of its blocks."""
    base = ask("x", [1, 2, 3], max_new_tokens=40)
    answer = expected_tokens(base, 40)
    adapter = ticket("a", invocation_tokens=(answer[5],))
    bench = Bench(num_units=40)
    bench.run(ask("first", [1, 2, 3], adapter, max_new_tokens=40))
    assert bench.answers["first"] == answer
    follow_up = ask("second", [1, 2, 3, *answer], adapter, max_new_tokens=3)
    bench.run(follow_up)
    assert bench.answers["second"] == expected_tokens(follow_up, 3)


def test_a_follow_up_that_invokes_later_in_the_same_block_shares_nothing_of_it() -> None:
    """The answer repeats the invocation, so that in the next turn the same tokens are the adapter's from later on."""
    for token in range(1, 64):
        adapter = ticket("a", invocation_tokens=(token,))
        first = ask("first", [0, token], adapter, max_new_tokens=6)
        answer = expected_tokens(first, 6)
        if token in answer[:2]:
            break
    bench = Bench()
    bench.run(first)
    follow_up = ask("second", [0, token, *answer], adapter)
    bench.run(follow_up)
    assert bench.answers["second"] == expected_tokens(follow_up, 4)


def test_an_adapters_larger_vocabulary_is_its_requests_only() -> None:
    bench = Bench()
    bench.engine.submit(ask("a", [69], WIDE, logit_bias=((68, 1.0),), stop_token_ids=(67,)))
    with pytest.raises(InvalidRequest, match="token_ids is 64, and must be ids from 0 to 63"):
        bench.engine.submit(ask("b", [64]))
    with pytest.raises(InvalidRequest, match="ids from 0 to 69"):
        bench.engine.submit(ask("c", [70], WIDE))
    with pytest.raises(InvalidRequest, match="logit_bias is 70"):
        bench.engine.submit(ask("d", [1], WIDE, logit_bias=((70, 1.0),)))
    bench.run_until(lambda: not bench.engine.has_work)
    assert len(bench.answers["a"]) == 4


def test_a_token_beyond_the_bases_vocabulary_ends_nothing_by_itself() -> None:
    bench = Bench()
    bench.runner._vocab_size = 2**20
    bench.run(ask("a", [1], ticket("wide", vocab_size=2**20), max_new_tokens=8, ignore_eos=False))
    assert bench.ends["a"].finish is FinishReason.LENGTH
    assert max(bench.answers["a"]) >= 64, "or the test shows nothing"


def test_the_table_keeps_what_a_row_needs_and_forgets_it() -> None:
    bench = Bench()
    bench.engine.submit(ask("a", [1, 2], ticket("p", num_virtual_tokens=BLOCK_SIZE, has_prefix=True)))
    while not bench.runner.plans:
        bench.step()
    table = bench.engine._table
    assert (table.prefix_length[0], table.position_offset[0], table.active_from[0]) == (4, 4, 0)
    bench.run(ask("b", [1, 2]))
    assert np.all([table.prefix_length[1], table.position_offset[1], table.active_from[1]]) == 0
