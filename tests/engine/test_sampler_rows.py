"""What a row gets never depends on its company, and a broken row breaks nobody else."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from server.engine.sampler import NOT_FINITE, NOTHING_LEFT
from tests.engine.sampling import EOS, Desk, Row, params
from tests.engine.test_sampler import random_row

VOCAB = 3000


def rows_and_logits(num_rows: int, dtype: torch.dtype = torch.float32) -> tuple[list[Row], torch.Tensor]:
    rng = np.random.default_rng(num_rows)
    rows = [random_row(rng) for _ in range(num_rows)]
    rows = [
        Row(
            params(
                **{name: getattr(row.params, name) for name in ("temperature", "top_k", "top_p", "min_p", "typical_p")},
                repetition_penalty=row.params.repetition_penalty,
                seed=index,
                num_logprobs=[None, 0, 5][index % 3],
            ),
            row.prompt,
            row.generated,
        )
        for index, row in enumerate(rows)
    ]
    return rows, (torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_token_and_the_same_record_in_any_company(dtype: torch.dtype) -> None:
    rows, logits = rows_and_logits(50, dtype)
    together = Desk(rows, VOCAB).sample(logits)
    for size in (1, 2, 7):
        for start in range(0, 50 - size, 3):
            part = slice(start, start + size)
            apart = Desk(rows[part], VOCAB, places=list(range(63, 63 - size, -1))).sample(logits[part])
            assert apart.token_ids.tolist() == together.token_ids[part].tolist()
            expected = {
                index - start: record for index, record in together.logprobs.items() if 0 <= index - start < size
            }
            assert apart.logprobs == expected


@pytest.mark.parametrize("broken", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_are_not_finite_fail_their_own_row_only(broken: float, dtype: torch.dtype) -> None:
    rows, logits = rows_and_logits(30, dtype)
    whole = Desk(rows, VOCAB).sample(logits)
    for index in (4, 17):
        logits[index, VOCAB - 1] = broken
    sampled = Desk(rows, VOCAB).sample(logits)
    assert whole.failed == {}
    assert sampled.failed == {4: NOT_FINITE, 17: NOT_FINITE}
    others = [index for index in range(30) if index not in (4, 17)]
    assert sampled.token_ids[others].tolist() == whole.token_ids[others].tolist()
    assert sampled.logprobs == {index: record for index, record in whole.logprobs.items() if index in others}


def test_a_greedy_batch_finds_broken_rows_too() -> None:
    logits = torch.randn(10, VOCAB)
    logits[3, 5] = float("nan")
    sampled = Desk([Row(params())] * 10, VOCAB).sample(logits)
    assert sampled.failed == {3: NOT_FINITE}
    assert sampled.token_ids[3] == 0


def test_tokens_that_the_model_itself_excludes_are_no_error() -> None:
    logits = torch.randn(2, VOCAB)
    logits[:, 100:] = -torch.inf
    rows = [Row(params()), Row(params(temperature=1.0, top_p=0.9, typical_p=0.9, num_logprobs=3))]
    sampled = Desk(rows, VOCAB).sample(logits)
    assert sampled.failed == {}
    assert (sampled.token_ids < 100).all()


def test_a_row_without_any_token_left_fails_alone() -> None:
    logits = torch.full((2, 10), -torch.inf)
    logits[:, EOS] = 1.0
    rows = [Row(params(temperature=1.0, min_new_tokens=5)), Row(params(temperature=1.0))]
    sampled = Desk(rows, 10).sample(logits)
    assert sampled.failed == {0: NOTHING_LEFT}
    assert sampled.token_ids[1] == EOS


def test_penalties_follow_the_tokens_as_they_come() -> None:
    """A flat model with a presence penalty may say nothing twice; without it says one token for ever."""
    logits = torch.zeros(2, 40)
    logits[:, 7] = 0.5
    desk = Desk([Row(params(presence_penalty=1.0), (1,)), Row(params(), (1,))], 40)
    said: list[list[int]] = []
    for _ in range(30):
        tokens = desk.sample(logits).token_ids
        said.append(tokens.tolist())
        desk.append(tokens)
    with_penalty, without = zip(*said, strict=True)
    assert len(set(with_penalty)) == 30
    assert set(without) == {7}


def test_counting_step_by_step_equals_counting_at_the_join() -> None:
    rng = np.random.default_rng(0)
    asked = params(repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2)
    prompts = [tuple(rng.integers(0, 50, 6).tolist()) for _ in range(20)]
    desk = Desk([Row(asked, prompt) for prompt in prompts], 50)
    history: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = []
    for step in range(25):
        logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(step))
        tokens = desk.sample(logits).token_ids
        rejoined = [Row(asked, prompt, tuple(int(old[row]) for old in history)) for row, prompt in enumerate(prompts)]
        assert Desk(rejoined, 50).sample(logits).token_ids.tolist() == tokens.tolist()
        history.append(tokens)
        desk.append(tokens)


def test_a_forgotten_row_leaves_nothing_to_the_next_one() -> None:
    logits = torch.randn(1, 100)
    asked = params(
        temperature=1.0, logit_bias=((3, 50.0),), presence_penalty=2.0, min_new_tokens=9, num_logprobs=2, top_k=4
    )
    desk = Desk([Row(asked)], 100)
    assert desk.sample(logits).token_ids.tolist() == [3]
    desk.sampler.forget(0)
    desk.join(0, Row(params()))
    sampled = desk.sample(logits)
    assert sampled.token_ids.tolist() == logits.argmax(-1).tolist()
    assert sampled.logprobs == {}


def test_prompts_may_hold_virtual_tokens_beyond_the_vocabulary() -> None:
    rows = [Row(params(repetition_penalty=1.5), (100, 101, 4)), Row(params(repetition_penalty=1.5), (100, 101))]
    desk = Desk(rows, 100)
    logits = torch.zeros(2, 100)
    logits[:, 4], logits[:, 5] = 1.0, 0.9
    assert desk.sample(logits).token_ids.tolist() == [5, 4]


def calls_in(desk: Desk, logits: torch.Tensor) -> int:
    """Python and C functions called while sampling."""
    num_calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        desk.sample(logits)
    finally:
        sys.setprofile(None)
    return num_calls


def test_a_plain_greedy_batch_does_nothing_per_row() -> None:
    few, many = Desk([Row(params())] * 4, 50), Desk([Row(params())] * 256, 50, max_num_seqs=256)
    assert calls_in(few, torch.randn(4, 50)) == calls_in(many, torch.randn(256, 50))
    asking = Desk([Row(params(num_logprobs=1))] * 256, 50, max_num_seqs=256)
    assert calls_in(asking, torch.randn(256, 50)) > 256
