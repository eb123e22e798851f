"""Whatever crosses the border between front and engine arrives as it was."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.traits import PLAIN_TRAITS, AdapterTraits
from server.channel import FrameDecoder, encode
from server.engine import wire
from server.engine.description import EngineDescription
from server.engine.request import (
    AdapterState,
    AdapterTicket,
    EngineErrorRecord,
    EngineRequest,
    FinishReason,
    RequestDelta,
    ResidentAdapter,
    SamplingParams,
    TokenLogprobs,
)
from server.engine.stats import EngineStats
from server.engine.step import AdapterEvent, StepOutput

ids = st.integers(0, 2**31)
finite = st.floats(allow_nan=False, allow_infinity=False)
pairs = st.lists(st.tuples(ids, finite), max_size=3).map(tuple)
texts = st.text(max_size=20)

params = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 10**6),
    temperature=finite,
    top_k=ids,
    top_p=finite,
    logit_bias=pairs,
    seed=st.integers(0, 2**63 - 1),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    num_logprobs=st.none() | st.integers(0, 20),
    num_prompt_logprobs=st.none() | st.integers(0, 20),
)
traits = st.builds(
    AdapterTraits,
    num_virtual_tokens=ids,
    first_position=ids,
    num_tasks=ids,
    has_prefix=st.booleans(),
    invocation_tokens=st.lists(ids, max_size=3).map(tuple),
    vocab_size=st.none() | ids,
)
tickets = st.builds(
    AdapterTicket, key=texts, name=texts, image_path=texts, num_bytes=ids, traits=st.just(PLAIN_TRAITS) | traits
)
requests = st.builds(
    EngineRequest,
    request_id=texts,
    token_ids=st.lists(ids, max_size=20).map(tuple),
    params=params,
    adapter=st.none() | tickets,
    cache_salt=texts,
    deadline_s=st.none() | finite,
    task_id=st.none() | ids,
)
logprobs = st.builds(TokenLogprobs, token_id=ids, logprob=finite, rank=ids, top=pairs)
deltas = st.builds(
    RequestDelta,
    request_id=texts,
    token_ids=st.lists(ids, max_size=4).map(tuple),
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3).map(tuple),
    num_cached_tokens=ids,
    queue_s=finite,
    finish=st.none() | st.sampled_from(FinishReason),
    error=st.none() | st.builds(EngineErrorRecord, kind=texts, message=texts, retryable=st.booleans()),
)


def through_the_wire(data: object) -> Any:
    return FrameDecoder().feed(encode({"data": data}))[0]["data"]


@given(requests)
@settings(max_examples=80, deadline=None)
def test_a_request_arrives_as_it_was(request: EngineRequest) -> None:
    arrived = wire.request_from_json(through_the_wire(wire.request_to_json(request)))
    assert arrived == request
    assert hash(arrived) == hash(request)  # tuples again, not lists


@given(st.lists(deltas, max_size=3), st.lists(st.tuples(texts, ids, st.none() | logprobs), max_size=5), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_step_arrives_as_it_was(
    special: list[RequestDelta], ordinary: list[tuple[str, int, TokenLogprobs | None]], asked: bool
) -> None:
    step = StepOutput(
        request_ids=[request_id for request_id, _, _ in ordinary],
        token_ids=[token_id for _, token_id, _ in ordinary],
        logprobs=[record for _, _, record in ordinary] if asked else [],
        special=special,
        adapter_events=[AdapterEvent("key", "sql@3", "failed", "truncated")] * len(special),
        num_tokens=len(ordinary),
    )
    assert wire.step_from_json(through_the_wire(wire.step_to_json(step))) == step


def test_every_field_of_a_delta_is_told() -> None:
    """A field added to RequestDelta and forgotten here would be lost in silence."""
    record = TokenLogprobs(3, -0.5, 1, ((3, -0.5),))
    full = RequestDelta(
        "a", (3,), (record,), (None, record), 5, 0.5, FinishReason.FAILED, EngineErrorRecord("K", "m", True)
    )
    bare = RequestDelta("a")
    told = [field.name for field in fields(RequestDelta) if getattr(full, field.name) == getattr(bare, field.name)]
    assert told == ["request_id"]
    assert wire.delta_from_json(through_the_wire(wire.delta_to_json(full))) == full
    assert wire.delta_to_json(bare) == {"id": "a"}  # and nothing is sent for what is not there


def test_an_ordinary_token_costs_two_array_entries() -> None:
    small, large = (StepOutput(["r"] * count, [7] * count) for count in (10, 110))
    grown = len(json.dumps(wire.step_to_json(large))) - len(json.dumps(wire.step_to_json(small)))
    assert grown == 100 * (len('"r", ') + len("7, "))


def test_an_unknown_sampling_field_is_an_error() -> None:
    data = wire.params_to_json(SamplingParams(3))
    assert wire.params_from_json(data) == SamplingParams(3)
    with pytest.raises(TypeError, match="temprature"):
        wire.params_from_json({**data, "temprature": 1.0})


def test_stats_description_and_residents_arrive_as_they_were() -> None:
    stats = replace(EngineStats(), num_running=3, total_finished={"eos": 2})
    assert wire.stats_from_json(through_the_wire(wire.stats_to_json(stats))) == stats
    description = EngineDescription(
        {"model_type": "llama", "sites": {}}, 128, 300, (2, 3), 64, 4096, 16, 8, "float32", "cpu", "float32"
    )
    assert wire.description_from_json(through_the_wire(wire.description_to_json(description))) == description
    residents = [ResidentAdapter("k", "sql@3", AdapterState.DEVICE, 100, 1, 2, 0.5)]
    assert wire.residents_from_json(through_the_wire(wire.residents_to_json(residents))) == residents
