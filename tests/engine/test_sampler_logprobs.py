"""Reported log probabilities are the model's own, finite, ranked, and equal to the bit wherever they are told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from server.engine.logprobs import prompt_logprobs, token_logprobs
from server.engine.request import MIN_LOGPROB
from tests.engine.sampling import Desk, Row, params

VOCAB = 400


def make_logits(num_rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(num_rows)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_equal_a_plain_log_softmax(dtype: torch.dtype) -> None:
    logits = make_logits(40, dtype)
    oracle = logits.double().log_softmax(-1)
    chosen = np.arange(40) * 9
    for index, record in enumerate(token_logprobs(logits, chosen, np.full(40, 5, dtype=np.int32))):
        order = oracle[index].argsort(descending=True, stable=True)
        assert record.token_id == chosen[index]
        assert record.logprob == pytest.approx(float(oracle[index, record.token_id]), abs=1e-5)
        assert order[record.rank - 1] == record.token_id
        assert [token for token, _ in record.top] == order[:5].tolist()
        assert [value for _, value in record.top] == pytest.approx(oracle[index, order[:5]].tolist(), abs=1e-5)


def test_only_rows_that_asked_get_a_record_with_as_many_tokens_as_they_asked_for() -> None:
    wanted = [None, 0, 1, 7, None, 20, VOCAB + 5]
    rows = [Row(params(num_logprobs=count)) for count in wanted]
    records = Desk(rows, VOCAB).sample(make_logits(len(rows))).logprobs
    assert {index: len(record.top) for index, record in records.items()} == {1: 0, 2: 1, 3: 7, 5: 20, 6: VOCAB}


def test_values_are_those_before_temperature_penalties_and_bias() -> None:
    logits = make_logits(1)
    plain = Desk([Row(params(num_logprobs=4))], VOCAB).sample(logits).logprobs[0]
    asked = params(temperature=1.9, top_k=3, logit_bias=((9, 60.0),), presence_penalty=1.0, num_logprobs=4)
    edited = Desk([Row(asked)], VOCAB).sample(logits).logprobs[0]
    assert edited.token_id == 9
    assert edited.top == plain.top
    assert edited.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 9]), abs=1e-5)
    assert edited.rank > 4


def test_the_chosen_token_has_the_same_bits_in_the_list_of_the_best() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = make_logits(60, dtype)
        rows = [Row(params(temperature=1.5, top_k=10, seed=seed, num_logprobs=10)) for seed in range(60)]
        sampled = Desk(rows, VOCAB).sample(logits)
        for record in sampled.logprobs.values():
            assert dict(record.top)[record.token_id] == record.logprob
            assert record.top[record.rank - 1] == (record.token_id, record.logprob)


def test_equal_logits_are_ranked_by_id_and_the_surplus_is_cut_off() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [50, 20, 300]] = 2.0
    record = token_logprobs(logits, np.array([300]), np.array([2], dtype=np.int32))[0]
    assert [token for token, _ in record.top] == [20, 50]
    assert record.rank == 3
    flat = token_logprobs(torch.zeros(1, VOCAB), np.array([399]), np.array([3], dtype=np.int32))[0]
    assert [token for token, _ in flat.top] == [0, 1, 2]
    assert flat.rank == VOCAB


def test_impossible_tokens_are_told_as_the_lowest_value_and_pass_through_json() -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 0] = 0.0
    record = token_logprobs(logits, np.array([7]), np.array([3], dtype=np.int32))[0]
    assert record.logprob == MIN_LOGPROB
    assert record.top == ((0, 0.0), (1, MIN_LOGPROB), (2, MIN_LOGPROB))
    json.dumps(record, allow_nan=False)


def test_prompt_records_judge_each_token_by_the_row_before_it() -> None:
    logits = make_logits(150)
    targets = np.random.default_rng(0).integers(0, VOCAB, 150).astype(np.int32)
    records = prompt_logprobs(logits, targets, 2)
    oracle = logits.double().log_softmax(-1)
    assert [record.token_id for record in records] == targets.tolist()
    assert [record.logprob for record in records] == pytest.approx(oracle[np.arange(150), targets].tolist(), abs=1e-5)
    assert all(len(record.top) == 2 for record in records)
    assert records == prompt_logprobs(logits[:70], targets[:70], 2) + prompt_logprobs(logits[70:], targets[70:], 2)
    assert prompt_logprobs(logits[:0], targets[:0], 2) == []
