"""The sampler chooses what transformers' processors, in transformers' order, would choose."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.truncation import Limits, truncate_
from tests.engine.sampling import EOS, Desk, Row, oracle_scores, oracle_token, params

VOCAB = 300
MARGIN = 1e-5  # of probability: nearer to the border of two tokens than this, float32 may choose the other


def logits_of(num_rows: int, seed: int, vocab: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def random_row(rng: np.random.Generator) -> Row:
    """Every parameter is on in about half of the rows."""

    def maybe(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.5 else off

    asked = params(
        temperature=maybe(float(rng.uniform(0.3, 1.8)), 1.0),
        top_k=maybe(int(rng.integers(1, VOCAB + 20)), 0),
        top_p=maybe(float(rng.uniform(0.2, 0.99)), 1.0),
        min_p=maybe(float(rng.uniform(0.01, 0.3)), 0.0),
        typical_p=maybe(float(rng.uniform(0.2, 0.99)), 1.0),
        repetition_penalty=maybe(float(rng.uniform(0.7, 1.8)), 1.0),
        frequency_penalty=maybe(float(rng.uniform(-1, 2)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-1, 2)), 0.0),
        logit_bias=maybe(((EOS, 9.0), (17, -3.0), (250, 4.5)), ()),
        min_new_tokens=maybe(int(rng.integers(1, 12)), 0),
        stop_token_ids=maybe((17, 250), ()),
        seed=int(rng.integers(0, 2**63)),
    )
    prompt = tuple(rng.integers(0, VOCAB, int(rng.integers(1, 30))).tolist())
    return Row(asked, prompt, tuple(rng.integers(0, VOCAB, int(rng.integers(0, 20))).tolist()))


def disagreements(rows: list[Row], expected_of: list[Row], logits: torch.Tensor) -> int:
    """How many clear choices differ between the sampler with `rows` and the oracle with `expected_of`."""
    chosen = Desk(rows, VOCAB).sample(logits).token_ids
    oracle = [oracle_token(logits[index], row) for index, row in enumerate(expected_of)]
    clear = np.array([margin > MARGIN for _, margin in oracle])
    assert clear.mean() > 0.9
    return int((chosen != np.array([token for token, _ in oracle]))[clear].sum())


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_of_parameters_chooses_what_transformers_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng) for _ in range(60)]
    assert disagreements(rows, rows, logits_of(60, seed)) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 2.5},
        {"top_k": 3},
        {"top_p": 0.15},
        {"min_p": 0.5},
        {"typical_p": 0.1},
        {"repetition_penalty": 3.0},
        {"frequency_penalty": 4.0},
        {"presence_penalty": -5.0},
        {"logit_bias": ((200, 8.0),)},
        {"min_new_tokens": 50},
        {"seed": 1},
    ],
)
def test_the_comparison_with_transformers_notices_a_wrong_parameter(wrong: dict[str, Any]) -> None:
    rows = [Row(params(temperature=1.0, seed=seed, logit_bias=((EOS, 6.0),)), (5, 7), (5, 7, 7)) for seed in range(60)]
    changed = [dataclasses.replace(row, params=dataclasses.replace(row.params, **wrong)) for row in rows]
    logits = logits_of(60, 3)
    logits[:, 5], logits[:, 7] = 9.0, 8.0
    assert disagreements(rows, rows, logits) == 0
    assert disagreements(changed, changed, logits) == 0
    assert disagreements(changed, rows, logits) > 0


@pytest.mark.parametrize("seed", range(4))
def test_greedy_rows_choose_after_bias_penalties_and_minimum_length(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng) for _ in range(60)]
    rows = [dataclasses.replace(row, params=dataclasses.replace(row.params, temperature=0.0)) for row in rows]
    logits = logits_of(60, seed)
    assert disagreements(rows, rows, logits) == 0
    assert (Desk(rows, VOCAB).sample(logits).token_ids != logits.argmax(-1).numpy()).any()


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 1},
        {"top_k": 200},
        {"top_k": 3000},
        {"top_p": 0.3},
        {"top_p": 0.97},
        {"top_p": 0.9999},
        {"min_p": 0.5},
        {"typical_p": 0.4},
        {"top_k": 500, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8},
    ],
)
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_exactly_the_tokens_that_transformers_keeps_are_kept(asked: dict[str, Any], spread: float) -> None:
    """On 5,000 tokens flat rows need all candidates and peaked ones a few: every way of finding a floor is taken."""
    logits = logits_of(6, 1, vocab=5000, spread=spread)
    row = Row(params(temperature=1.0, **asked))
    scores = logits - logits.amax(-1, keepdim=True)
    arrays = (row.params.top_k, row.params.top_p, row.params.min_p, row.params.typical_p)
    truncate_(scores, Limits(*(np.full(6, value) for value in arrays)))
    expected = torch.stack([oracle_scores(one, row) for one in logits])
    differing = (scores.isneginf() != expected.isneginf()).sum(-1)
    # A running sum over thousands of float64 terms may put the last token of a nucleus on either side.
    assert differing.max() <= 1
    assert expected.isneginf().any()


def test_greedy_ties_go_to_the_lowest_id_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.zeros(40, VOCAB, dtype=dtype)
        logits[:, [31, 32, 33, 299]] = 4.0
        logits[7, 3] = 4.0
        chosen = Desk([Row(params())] * 40, VOCAB).sample(logits).token_ids
        assert chosen.tolist() == [3 if index == 7 else 31 for index in range(40)]


def test_bfloat16_and_float16_logits_choose_like_their_float32_copies() -> None:
    rng = np.random.default_rng(5)
    rows = [random_row(rng) for _ in range(40)]
    for dtype in (torch.bfloat16, torch.float16):
        logits = logits_of(40, 9).to(dtype)
        low, full = Desk(rows, VOCAB).sample(logits), Desk(rows, VOCAB).sample(logits.float())
        assert low.token_ids.tolist() == full.token_ids.tolist()


def test_tokens_of_equal_score_stay_or_go_together() -> None:
    scores = torch.tensor([[0.0, -1.0, -1.0, -1.0, -5.0]])
    for limits in ((2, 1.0, 0.0, 1.0), (0, 0.6, 0.0, 1.0)):
        left = scores.clone()
        truncate_(left, Limits(*(np.array([value]) for value in limits)))
        assert left.isneginf().tolist() == [[False, False, False, False, True]]


def test_a_tiny_temperature_is_greedy_and_never_breaks() -> None:
    logits = logits_of(20, 4)
    for temperature in (1e-6, 1e-30, 1e-42):
        rows = [Row(params(temperature=temperature, top_p=0.9, typical_p=0.9, seed=seed)) for seed in range(20)]
        sampled = Desk(rows, VOCAB).sample(logits)
        assert sampled.token_ids.tolist() == logits.argmax(-1).tolist()
        assert sampled.failed == {}


def test_the_logits_are_left_as_they_were() -> None:
    rng = np.random.default_rng(8)
    logits = logits_of(30, 2)
    before = logits.clone()
    Desk([random_row(rng) for _ in range(30)], VOCAB).sample(logits)
    assert torch.equal(logits, before)


def test_a_bias_outside_the_vocabulary_is_refused_by_number() -> None:
    with pytest.raises(ValueError, match="logit_bias names token 300, but the vocabulary has the tokens 0 to 299"):
        Desk([Row(params(logit_bias=((VOCAB, 1.0),)))], VOCAB)


def test_an_empty_batch_samples_nothing() -> None:
    assert Desk([], VOCAB).sample(torch.zeros(0, VOCAB)).token_ids.shape == (0,)
