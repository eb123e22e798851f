"""The engine on a simulated device, through its public door."""

from __future__ import annotations

import pytest

from server.engine.errors import AdapterTooLarge, InvalidRequest, RequestTooLong
from server.engine.request import EngineRequest, FinishReason, TokenLogprobs
from tests.engine.simulated import EOS, Bench, ask, expected_tokens, ticket


def test_a_request_is_answered_and_ends_by_length() -> None:
    bench = Bench()
    request = ask("a", [1, 2, 3, 4, 5], max_new_tokens=6)
    bench.run(request)
    assert bench.answers["a"] == expected_tokens(request, 6)
    assert bench.ends["a"].finish is FinishReason.LENGTH
    bench.check_idle()


def test_a_mixed_batch_gives_every_request_its_own_answer() -> None:
    bench = Bench(num_units=200)
    adapters = [None, ticket("sql"), ticket("poet", 5), ticket("law", 1)]
    requests = [ask(f"r{i}", list(range(i % 7 + 1)) * 3, adapters[i % 4], max_new_tokens=i + 1) for i in range(16)]
    bench.run(*requests)
    for i, request in enumerate(requests):
        assert bench.answers[request.request_id] == expected_tokens(request, i + 1)
    assert max(len(plan.rows) for plan in bench.runner.plans) == 8, "the batch was never full"
    bench.check_idle()


def test_ordinary_tokens_travel_in_parallel_arrays() -> None:
    bench = Bench()
    bench.run(ask("a", [1, 2]), ask("b", [3, 4]))
    first, second, *_ = bench.outputs
    assert [delta.request_id for delta in first.special] == ["a", "b"], "first tokens say more"
    assert second.request_ids == ["a", "b"]
    assert second.special == []
    assert all(type(token_id) is int for token_id in second.token_ids)


def test_a_chunk_ends_at_multiples_of_the_sequences_own_positions() -> None:
    bench = Bench(chunk_size=8, budget=16)
    bench.run(ask("long", list(range(30)), max_new_tokens=2), ask("short", [1, 2, 3], max_new_tokens=8))
    chunks = [
        (int(plan.starts[i]), int(plan.counts[i]))
        for plan in bench.runner.plans
        for i, sequence in enumerate(plan.sequences)
        if sequence.request_id == "long"
    ]
    assert chunks == [(0, 8), (8, 8), (16, 8), (24, 6), (30, 1)]


def test_a_crowded_out_prefill_gets_its_turn() -> None:
    bench = Bench(budget=8, chunk_size=8)
    bench.engine.submit(ask("stream", [1], max_new_tokens=100))
    bench.step()
    bench.engine.submit(ask("long", list(range(24)), max_new_tokens=1))
    for _ in range(8):
        bench.step()
    assert bench.ends["long"].finish is FinishReason.LENGTH
    assert len(bench.answers["stream"]) >= 4, "and the stream goes on in between"


def test_a_step_holds_no_more_tokens_than_its_budget() -> None:
    bench = Bench(budget=16, chunk_size=8)
    bench.run(*[ask(f"r{i}", list(range(20)), max_new_tokens=5, salt=str(i)) for i in range(8)])
    assert max(plan.num_tokens for plan in bench.runner.plans) <= 16


def test_end_of_sequence_and_stop_ids_end_a_request() -> None:
    bench = Bench()
    request = ask("probe", [5, 6, 7], max_new_tokens=20)
    answer = expected_tokens(request, 20)
    bench.run(ask("stopped", [5, 6, 7], max_new_tokens=20, stop_token_ids=(answer[3],)))
    assert bench.ends["stopped"].finish is FinishReason.STOP_TOKEN
    assert bench.answers["stopped"] == answer[: answer.index(answer[3]) + 1]


def _prompt_that_meets_eos(after: int) -> tuple[list[int], int]:
    """A prompt whose answer has the end-of-sequence token, first at an index >= `after`."""
    for token in range(1000):
        prompt = [token % 60, token // 60, 1]
        answer = expected_tokens(ask("x", prompt), 40)
        if EOS in answer and answer.index(EOS) >= after:
            return prompt, answer.index(EOS)
    raise AssertionError("no such prompt")


def test_end_of_sequence_ends_a_request_unless_it_is_ignored_or_too_early() -> None:
    bench = Bench()
    prompt, index = _prompt_that_meets_eos(after=2)
    bench.run(
        ask("ends", prompt, max_new_tokens=40, ignore_eos=False),
        ask("ignores", prompt, max_new_tokens=40, ignore_eos=True),
        ask("too early", prompt, max_new_tokens=index + 2, min_new_tokens=index + 2, ignore_eos=False),
    )
    assert bench.ends["ends"].finish is FinishReason.EOS
    assert len(bench.answers["ends"]) == index + 1
    assert bench.ends["ignores"].finish is FinishReason.LENGTH
    assert len(bench.answers["too early"]) == index + 2


def test_a_stop_id_ends_nothing_before_the_least_number_of_tokens() -> None:
    bench = Bench()
    answer = expected_tokens(ask("x", [9, 9]), 1)
    bench.run(ask("a", [9, 9], max_new_tokens=5, min_new_tokens=5, stop_token_ids=(answer[0],)))
    assert len(bench.answers["a"]) == 5


def test_more_stop_ids_than_the_table_is_wide_are_all_honoured() -> None:
    bench = Bench()
    answer = expected_tokens(ask("x", [9, 9]), 1)
    others = tuple(i for i in range(40) if i != answer[0])
    bench.run(ask("a", [9, 9], max_new_tokens=9, stop_token_ids=(*others, answer[0])))
    assert bench.ends["a"].finish is FinishReason.STOP_TOKEN
    assert bench.answers["a"] == answer


def test_preempted_requests_answer_as_if_nothing_had_happened() -> None:
    bench = Bench(num_units=14, max_num_seqs=4)
    requests = [ask(f"r{i}", [i, i + 1, i + 2], max_new_tokens=25, salt=str(i)) for i in range(4)]
    bench.run(*requests)
    assert bench.engine.stats().total_preemptions > 0, "the pool was not small enough to say anything"
    for request in requests:
        assert bench.answers[request.request_id] == expected_tokens(request, 25)
    bench.check_idle()


def test_the_youngest_is_preempted() -> None:
    bench = Bench(num_units=8, max_num_seqs=2)
    old, young = ask("old", [1, 2, 3], max_new_tokens=25), ask("young", [4, 5, 6], max_new_tokens=25)
    bench.run(old, young)
    order = list(bench.ends)
    assert bench.engine.stats().total_preemptions > 0
    assert order == ["old", "young"]


def test_a_prompt_seen_before_is_not_computed_again_but_for_its_end() -> None:
    bench = Bench()
    prompt = list(range(17))
    bench.run(ask("first", prompt))
    bench.run(ask("second", prompt))
    told = {d.request_id: d.num_cached_tokens for o in bench.outputs for d in o.special if d.num_cached_tokens}
    assert told == {"second": 16}
    assert bench.answers["first"] == bench.answers["second"]
    stats = bench.engine.stats()
    assert (stats.total_prefix_queries, stats.total_prefix_hits) == (34, 16)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    bench = Bench()
    prompt = list(range(16))
    bench.run(ask("first", prompt))
    bench.run(ask("second", prompt))
    assert bench.engine.stats().total_prefix_hits == 12


@pytest.mark.parametrize(
    ("adapter", "salt"), [("other", "tenant"), (None, "tenant"), ("one", "another tenant")], ids=str
)
def test_no_prefix_is_shared_across_adapters_or_tenants(adapter: str | None, salt: str) -> None:
    bench = Bench()
    prompt = list(range(17))
    bench.run(ask("first", prompt, ticket("one"), salt="tenant"))
    bench.run(ask("second", prompt, None if adapter is None else ticket(adapter), salt=salt))
    assert bench.engine.stats().total_prefix_hits == 0
    bench.run(ask("third", prompt, ticket("one"), salt="tenant"))
    assert bench.engine.stats().total_prefix_hits == 16, "the control: the same adapter and tenant do hit"


def test_without_prefix_caching_nothing_is_found_and_nothing_kept() -> None:
    bench = Bench(caching=False)
    bench.run(ask("first", list(range(17))))
    bench.run(ask("second", list(range(17))))
    stats = bench.engine.stats()
    assert (stats.total_prefix_hits, stats.units_cached) == (0, 0)


def test_an_answer_continues_the_cache_for_the_next_turn() -> None:
    bench = Bench()
    request = ask("turn 1", list(range(10)), max_new_tokens=11)
    bench.run(request)
    history = list(range(10)) + bench.answers["turn 1"]
    bench.run(ask("turn 2", [*history, 1, 2, 3]))
    assert bench.engine.stats().total_prefix_hits == 20, "20 of 21 tokens have K/V, in 5 full blocks"


def test_logprobs_come_with_every_token_that_asked() -> None:
    bench = Bench()
    bench.run(ask("a", [1, 2, 3], num_logprobs=0, max_new_tokens=3), ask("b", [1, 2, 3], max_new_tokens=3))
    told: dict[str, list[TokenLogprobs | None]] = {"a": [], "b": []}
    for output in bench.outputs:
        for request_id, record in zip(output.request_ids, output.logprobs, strict=bool(output.logprobs)):
            told[request_id].append(record)
        for delta in output.special:
            told[delta.request_id] += delta.logprobs
    assert [record and record.token_id for record in told["a"]] == bench.answers["a"]
    assert [record for record in told["b"] if record is not None] == []


@pytest.mark.parametrize("num_units", [64, 13], ids=["undisturbed", "preempted"])
def test_prompt_logprobs_are_collected_over_chunks_and_told_once(num_units: int) -> None:
    bench = Bench(chunk_size=4, budget=4, num_units=num_units, max_num_seqs=2)
    bench.engine.submit(ask("old", [1], max_new_tokens=40))
    bench.run_until(lambda: len(bench.answers.get("old", [])) == 5)
    bench.run(ask("a", list(range(40)), num_prompt_logprobs=0, max_new_tokens=3))
    told = [d.prompt_logprobs for o in bench.outputs for d in o.special if d.prompt_logprobs is not None]
    assert told == [(None, *(TokenLogprobs(p, -float(p), 1, ()) for p in range(1, 40)))]
    assert (bench.engine.stats().total_preemptions > 0) == (num_units == 13)


def test_prompt_logprobs_do_not_come_from_the_cache() -> None:
    bench = Bench()
    bench.run(ask("first", list(range(17))))
    bench.run(ask("second", list(range(17)), num_prompt_logprobs=0))
    assert bench.engine.stats().total_prefix_hits == 0
    assert bench.answers["first"] == bench.answers["second"]


def test_an_abort_takes_effect_at_the_next_step_wherever_the_request_is() -> None:
    bench = Bench(max_num_seqs=1)
    for name in ("running", "waiting"):
        bench.engine.submit(ask(name, [1, 2, 3], max_new_tokens=100))
    bench.step()
    assert bench.engine.abort("running")
    assert bench.engine.abort("waiting")
    assert bench.engine.abort("running"), "twice is once"
    bench.step()
    assert {name: end.finish for name, end in bench.ends.items()} == dict.fromkeys(
        ("running", "waiting"), FinishReason.ABORTED
    )
    assert not bench.engine.abort("running"), "it has ended"
    bench.check_idle()


def test_a_request_past_its_deadline_fails_wherever_it_is() -> None:
    bench = Bench(max_num_seqs=1)
    bench.engine.submit(ask("running", [1, 2, 3], max_new_tokens=100, deadline_s=5.0))
    bench.engine.submit(ask("waiting", [1, 2, 3], deadline_s=3.0))
    bench.engine.submit(ask("patient", [1, 2, 3], deadline_s=500.0))
    bench.step()
    bench.clock.now = 4.0
    bench.step()
    assert list(bench.ends) == ["waiting"]
    bench.clock.now = 6.0
    bench.run()
    errors = {name: end.error and end.error.kind for name, end in bench.ends.items()}
    assert errors == {"waiting": "DeadlineExceeded", "running": "DeadlineExceeded", "patient": None}
    bench.check_idle()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ask("x", []), InvalidRequest),
        (ask("x", [64]), InvalidRequest),
        (ask("x", [-1]), InvalidRequest),
        (ask("", [1]), InvalidRequest),
        (ask("x", [1], max_new_tokens=0), InvalidRequest),
        (ask("x", [1], min_new_tokens=5), InvalidRequest),
        (ask("x", [1], temperature=-0.1), InvalidRequest),
        (ask("x", [1], temperature=float("nan")), InvalidRequest),
        (ask("x", [1], top_p=0.0), InvalidRequest),
        (ask("x", [1], stop_token_ids=(64,)), InvalidRequest),
        (ask("x", [1], logit_bias=((64, 1.0),)), InvalidRequest),
        (ask("x", [1], num_logprobs=-1), InvalidRequest),
        (ask("x", [1], deadline_s=0.0), InvalidRequest),
        (ask("x", [1] * 128), RequestTooLong),
        (ask("x", [1] * 100, ticket("large", 20)), RequestTooLong),
        (ask("x", [1], ticket("huge", 41)), AdapterTooLarge),
    ],
    ids=repr,
)
def test_what_could_never_run_is_refused_at_submit(request_: EngineRequest, error: type[Exception]) -> None:
    bench = Bench(num_units=40)
    with pytest.raises(error):
        bench.engine.submit(request_)
    bench.check_idle()


def test_a_refusal_gives_the_numbers() -> None:
    bench = Bench(num_units=40)
    with pytest.raises(RequestTooLong, match=r"200 tokens .* maximum length is 128, .* at most 127"):
        bench.engine.submit(ask("x", [1] * 200))


def test_a_request_id_in_use_is_refused_and_free_again_afterwards() -> None:
    bench = Bench()
    bench.engine.submit(ask("x", [1]))
    with pytest.raises(InvalidRequest, match="in use"):
        bench.engine.submit(ask("x", [2]))
    bench.run()
    bench.ends.clear()
    bench.run(ask("x", [2]))


def test_an_answer_ends_by_length_where_model_or_pool_end() -> None:
    bench = Bench(num_units=10, max_model_len=30)
    model_bound = ask("model", [1, 2], max_new_tokens=1000)
    pool_bound = ask("pool", [1, 2], ticket("large", 5), max_new_tokens=1000)
    bench.run(model_bound, pool_bound)
    assert bench.answers["model"] == expected_tokens(model_bound, 28)
    assert bench.answers["pool"] == expected_tokens(pool_bound, 5 * 4 + 1 - 2)
    assert {end.finish for end in bench.ends.values()} == {FinishReason.LENGTH}
    bench.check_idle()
