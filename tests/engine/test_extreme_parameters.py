"""Parameters at the edge of what numbers can hold harm nobody but the request that carries them."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.errors import InvalidRequest
from server.engine.request import EngineRequest, FinishReason, RequestDelta, SamplingParams
from tests.tiny_engine import TinyEngine
from tests.tiny_models import VOCAB, make_model

HUGE = 2**40
BEYOND_FLOAT32 = 1e39


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return TinyEngine(make_model("qwen2"), tmp_path_factory.mktemp("extreme"))


def end_of(tiny: TinyEngine, **values: Any) -> RequestDelta:
    """How the request ends, run beside an ordinary one, which must not notice."""
    params = SamplingParams(**{"max_new_tokens": 4, "ignore_eos": True, **values})
    tiny.engine.submit(EngineRequest("extreme", (5, 6, 7), params))
    tiny.engine.submit(EngineRequest("ordinary", (5, 6, 7), SamplingParams(max_new_tokens=4, ignore_eos=True)))
    ends = {}
    while tiny.engine.has_work:
        ends.update({delta.request_id: delta for delta in tiny.engine.step().special if delta.finish})
    tiny.engine.check_integrity()
    assert ends["ordinary"].finish is FinishReason.LENGTH, ends["ordinary"].error
    return ends["extreme"]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e-46},
        {"temperature": 3e38, "min_new_tokens": 2, "stop_token_ids": (4,)},
        {"temperature": 1.0, "top_k": HUGE},
        {"temperature": 1.0, "top_p": 1e-300, "min_p": 1e-300, "typical_p": 1e-300},
        {"temperature": 1.0, "seed": 2**80},
        {"max_new_tokens": HUGE, "min_new_tokens": HUGE},
    ],
)
def test_a_parameter_that_is_merely_extreme_is_honoured(tiny: TinyEngine, values: dict[str, Any]) -> None:
    assert end_of(tiny, **values).finish is FinishReason.LENGTH


def test_a_temperature_too_small_for_a_float_is_greedy(tiny: TinyEngine) -> None:
    last = [end_of(tiny, temperature=temperature, seed=3).token_ids for temperature in (1e-46, 0.0, 100.0)]
    assert last[0] == last[1]
    assert last[0] != last[2]


@pytest.mark.parametrize(
    "values",
    [
        {"logit_bias": ((9, 3e38), (9, 3e38))},
        {"frequency_penalty": -3e38},
        {"repetition_penalty": 1e-300},
    ],
)
def test_edits_that_overflow_a_logit_fail_their_own_request_only(tiny: TinyEngine, values: dict[str, Any]) -> None:
    end = end_of(tiny, temperature=1.0, **values)
    assert end.finish is FinishReason.FAILED
    assert end.error is not None
    assert end.error.kind == "InvalidLogits"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", BEYOND_FLOAT32),
        ("temperature", float("nan")),
        ("repetition_penalty", BEYOND_FLOAT32),
        ("frequency_penalty", BEYOND_FLOAT32),
        ("presence_penalty", -BEYOND_FLOAT32),
        ("logit_bias", ((9, BEYOND_FLOAT32),)),
    ],
)
def test_a_number_that_the_sampler_cannot_hold_is_refused(tiny: TinyEngine, field: str, value: Any) -> None:
    params = SamplingParams(**{"max_new_tokens": 4, field: value})
    with pytest.raises(InvalidRequest, match=field):
        tiny.engine.submit(EngineRequest("a", (5,), params))


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**70])
def test_a_token_that_does_not_exist_is_refused(tiny: TinyEngine, token_id: int) -> None:
    with pytest.raises(InvalidRequest, match=f"token_ids is {token_id}"):
        tiny.engine.submit(EngineRequest("a", (5, token_id), SamplingParams(max_new_tokens=1)))
