"""Draws follow the probabilities, and depend on the seed and the place in the sequence, on nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from server.engine.draws import draw, uniforms
from tests.engine.sampling import Desk, Row, params

NUM_DRAWS = 40_000


def chi_square_quantile(freedom: int, z: float) -> float:
    """Wilson and Hilferty's approximation; z = 4 is exceeded by chance once in 30,000 times."""
    return freedom * float((1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3)


def chi_square(tokens: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The statistic and its limit, over the tokens that are expected at least ten times; the rest is one class."""
    expected = probabilities * len(tokens)
    observed = np.bincount(tokens, minlength=len(expected)).astype(np.float64)
    is_common = expected >= 10
    expected = np.append(expected[is_common], expected[~is_common].sum())
    observed = np.append(observed[is_common], observed[~is_common].sum())
    used = expected > 0
    assert observed[~used].sum() == 0
    statistic = float(((observed - expected)[used] ** 2 / expected[used]).sum())
    return statistic, chi_square_quantile(int(used.sum()) - 1, 4.0)


def drawn_tokens(logits: torch.Tensor, vary: str, **asked: Any) -> npt.NDArray[np.int64]:
    """One distribution drawn from again and again, with another seed or at another place each time."""
    num_rows = 400
    rows = [Row(params(seed=index if vary == "seed" else 7, **asked)) for index in range(num_rows)]
    desk = Desk(rows, len(logits), max_num_seqs=num_rows)
    batch = logits.expand(num_rows, -1).contiguous()
    tokens = []
    for step in range(NUM_DRAWS // num_rows):
        first = step * num_rows if vary == "place" else step
        desk.table.length[:] = 3 + (first + np.arange(num_rows) if vary == "place" else first)
        tokens.append(desk.sample(batch).token_ids)
    return np.concatenate(tokens)


def test_draws_follow_the_probabilities_over_places_and_over_seeds() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2
    probabilities = (logits.double() / 0.8).softmax(-1).numpy()
    for vary in ("place", "seed"):
        statistic, limit = chi_square(drawn_tokens(logits, vary, temperature=0.8), probabilities)
        assert statistic < limit


def test_the_statistic_notices_a_temperature_that_is_off_by_a_twentieth() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2
    probabilities = (logits.double() / 0.84).softmax(-1).numpy()
    statistic, limit = chi_square(drawn_tokens(logits, "place", temperature=0.8), probabilities)
    assert statistic > limit


def test_draws_after_truncation_follow_what_is_left() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 2
    kept = logits.topk(30)
    probabilities = np.zeros(500)
    probabilities[kept.indices.numpy()] = kept.values.double().softmax(-1).numpy()
    statistic, limit = chi_square(drawn_tokens(logits, "place", temperature=1.0, top_k=30), probabilities)
    assert statistic < limit


def test_a_sequence_draws_the_same_tokens_again_after_it_came_back_to_another_row() -> None:
    """Preempted after six tokens, joined elsewhere with its tokens restored, in other company."""
    row = Row(params(temperature=1.0, top_p=0.95, repetition_penalty=1.3, presence_penalty=0.5, seed=99), (4, 8, 15))
    logits = torch.randn(12, 2000, generator=torch.Generator().manual_seed(2))

    alone = Desk([row], 2000)
    whole = []
    for step in logits:
        whole.append(int(alone.sample(step[None]).token_ids[0]))
        alone.append(np.array([whole[-1]]))

    others = [Row(params(temperature=0.7, seed=seed, frequency_penalty=1.0)) for seed in range(5)]
    back = dataclasses.replace(row, generated=tuple(whole[:6]))
    crowd = Desk([*others, back], 2000, places=[3, 9, 1, 40, 22, 17])
    for index, step in enumerate(logits[6:]):
        noise = torch.randn(5, 2000, generator=torch.Generator().manual_seed(index))
        sampled = crowd.sample(torch.cat([noise, step[None]])).token_ids
        assert int(sampled[-1]) == whole[6 + index]
        crowd.append(sampled)


def test_other_seeds_and_other_places_draw_other_tokens() -> None:
    logits = torch.zeros(64, 4000)
    rows = [Row(params(temperature=1.0, seed=seed)) for seed in range(64)]
    desk = Desk(rows, 4000)
    first = desk.sample(logits).token_ids
    assert desk.sample(logits).token_ids.tolist() == first.tolist()
    desk.append(first)
    second = desk.sample(logits).token_ids
    assert len(set(first.tolist())) > 60
    assert (first == second).sum() < 3


def test_seeds_of_any_sign_and_size_are_honoured() -> None:
    logits = torch.zeros(4, 4000)
    rows = [Row(params(temperature=1.0, seed=seed)) for seed in (-1, 0, 2**63, 2**64 - 2)]
    assert len(set(Desk(rows, 4000).sample(logits).token_ids.tolist())) == 4


def test_uniform_numbers_are_uniform_and_uncorrelated_between_neighbouring_seeds() -> None:
    seeds, steps = np.arange(200, dtype=np.uint64).repeat(200), np.tile(np.arange(200), 200)
    numbers = uniforms(seeds, steps).reshape(200, 200)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    statistic, limit = chi_square((numbers.ravel() * 100).astype(np.int64), np.full(100, 0.01))
    assert statistic < limit
    for shifted in (np.roll(numbers, 1, axis=0), np.roll(numbers, 1, axis=1), numbers.T):
        assert abs(np.corrcoef(numbers[1:, 1:].ravel(), shifted[1:, 1:].ravel())[0, 1]) < 0.02


def test_the_last_number_below_one_never_reaches_a_removed_token() -> None:
    scores = torch.full((3, 1000), -torch.inf)
    scores[0, 0] = 0.0
    scores[1, [0, 500]] = 0.0
    scores[2, :700] = -torch.rand(700, generator=torch.Generator().manual_seed(0))
    scores[2, 0] = 0.0
    largest = torch.full((3,), 1.0 - 2.0**-53, dtype=torch.float64)
    assert draw(scores, largest).tolist() == [0, 500, 699]
    assert draw(scores, torch.zeros(3, dtype=torch.float64)).tolist() == [0, 0, 0]
