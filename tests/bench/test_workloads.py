"""The generators follow their definitions: call order of the random streams, known moments, known totals."""

from __future__ import annotations

import numpy as np
import pytest

from bench.workloads import (
    ALL_LINEAR,
    ATTENTION,
    BASE,
    Workload,
    lognormal_lengths,
    mixed,
    punica,
    punica_shares,
    s_lora,
    uniform_twin,
    zipf,
    zipf_probabilities,
)


def columns(workload: Workload) -> tuple[list[int], list[int], list[int], list[float]]:
    arrivals = workload.arrivals
    return (
        [one.adapter for one in arrivals],
        [one.num_prompt_tokens for one in arrivals],
        [one.num_output_tokens for one in arrivals],
        [one.arrival_s for one in arrivals],
    )


@pytest.mark.parametrize(
    ("num_adapters", "alpha", "rate", "cv", "duration_s"),
    [
        (200, 1.0, 2.0, 1.0, 300.0),
        (200, 0.1, 2.0, 1.0, 300.0),
        (32, 1.0, 2.0, 8.0, 120.0),
        (1000, 0.8, 20.0, 1.0, 60.0),
    ],
)
def test_s_lora_draws_from_the_legacy_stream_in_the_published_order(
    num_adapters: int, alpha: float, rate: float, cv: float, duration_s: float
) -> None:
    """The same calls as the published generator makes on numpy's global stream: power, randint, randint, gamma."""
    state = np.random.get_state()
    try:
        np.random.seed(42)
        total = int(rate * duration_s)
        adapters = (np.random.power(alpha, total) * num_adapters).astype(int)
        inputs = np.random.randint(8, 512, total)
        outputs = np.random.randint(8, 512, total)
        gaps = np.random.gamma(1 / (cv * cv), cv * cv / rate, total)
    finally:
        np.random.set_state(state)
    times, now = [], 0.0
    for gap in gaps.tolist():
        now += gap
        times.append(now)
    made = s_lora(num_adapters=num_adapters, alpha=alpha, rate=rate, cv=cv, duration_s=duration_s)
    assert columns(made) == (adapters.tolist(), inputs.tolist(), outputs.tolist(), times)
    swapped = s_lora(num_adapters=num_adapters, alpha=alpha, rate=rate, cv=cv, duration_s=duration_s, seed=43)
    assert columns(swapped) != columns(made)


def test_s_lora_popularity_follows_its_power_law() -> None:
    """P(i) = ((i + 1) / n)^alpha - (i / n)^alpha: the published shares of the most popular adapter of 200."""
    for alpha, share in ((1.0, 0.005), (0.3, 0.204), (0.1, 0.589)):
        made = s_lora(num_adapters=200, alpha=alpha, rate=100.0, duration_s=400.0)
        counts = np.bincount(columns(made)[0], minlength=200)
        assert counts[0] / counts.sum() == pytest.approx(share, abs=0.006)
        expected = np.diff((np.arange(201) / 200) ** alpha)
        assert np.abs(counts / counts.sum() - expected).max() < 0.006


def test_s_lora_gaps_have_the_asked_rate_and_burstiness() -> None:
    for cv in (1.0, 4.0):
        gaps = np.diff(columns(s_lora(num_adapters=4, rate=5.0, cv=cv, duration_s=8_000.0))[3])
        assert gaps.mean() == pytest.approx(0.2, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_s_lora_ranks_go_round_robin_and_change_attention_only() -> None:
    made = s_lora(num_adapters=6, ranks=(64, 32, 16, 8), duration_s=10.0)
    assert [one.rank for one in made.adapters] == [64, 32, 16, 8, 64, 32]
    assert {one.targets for one in made.adapters} == {ATTENTION}
    assert {one.adapter for one in s_lora(num_adapters=0, duration_s=10.0).arrivals} == {BASE}


def test_punica_gives_the_published_lengths() -> None:
    """1,024 requests: 1,033,755 tokens, mean prompt 23.6, mean output 985.9."""
    _, prompts, outputs, times = columns(punica())
    assert sum(prompts) + sum(outputs) == 1_033_755
    assert np.mean(prompts) == pytest.approx(23.623, abs=1e-3)
    assert np.mean(outputs) == pytest.approx(985.903, abs=1e-3)
    assert set(times) == {0.0}
    assert max(prompt + output for prompt, output in zip(prompts, outputs, strict=True)) <= 2048


def test_punica_shares_are_the_published_ones() -> None:
    assert punica_shares(32, "zipf:1.5") == [11, 7, 5, 3, 2, 2, 1, 1]
    big = [291, 194, 157, 129, 86, 57, 38, 25, 17, 11, 7, 5, 3, 2, 1, 1]
    assert punica_shares(1024, "zipf:1.5") == big
    assert punica_shares(32, "uniform") == [6, 6, 5, 5, 5, 5]
    assert punica_shares(3, "distinct") == [1, 1, 1]
    assert punica_shares(3, "identical") == [3]
    for popularity in ("distinct", "identical", "uniform", "zipf:1.5", "zipf:2"):
        for number in range(1, 300):
            assert sum(punica_shares(number, popularity)) == number
    counts = sorted(np.bincount(columns(punica())[0]).tolist(), reverse=True)
    assert counts == big


def test_an_unknown_popularity_is_refused() -> None:
    for popularity in ("zipf", "zipf:1", "skewed"):
        with pytest.raises(ValueError, match="none of distinct, identical, uniform"):
            punica_shares(8, popularity)


def test_zipf_is_a_true_zipf_law() -> None:
    """Published shares of the most popular of 1,000 adapters, and Poisson arrivals."""
    for exponent, share in ((0.9, 0.095), (1.0, 0.134), (1.2, 0.231), (1.5, 0.392)):
        assert zipf_probabilities(1000, exponent)[0] == pytest.approx(share, abs=1e-3)
    adapters, _, _, times = columns(zipf(num_adapters=50, num_requests=50_000, rate=10.0))
    counts = np.bincount(adapters, minlength=50)
    assert np.abs(counts / counts.sum() - zipf_probabilities(50, 1.0)).max() < 0.005
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.1, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)


def test_mixed_is_as_uneven_as_it_says() -> None:
    made = mixed(num_requests=5000)
    adapters, prompts, outputs, times = columns(made)
    middle = 2500
    assert (prompts[middle], max(prompts)) == (4096, 4096)
    others = prompts[:middle] + prompts[middle + 1 :]
    assert 8 <= min(others) < 12
    assert 1300 < max(others) <= 1500
    assert 8 <= min(outputs) < 10
    assert 190 < max(outputs) <= 200
    assert np.std(np.log(others)) > 0.9
    assert len(made.adapters) == 40
    assert {one.rank for one in made.adapters} == {4, 8, 16, 64}
    assert len({one.targets for one in made.adapters}) == 4
    assert len({(one.rank, one.targets) for one in made.adapters}) == 16
    counts = np.bincount(adapters, minlength=40) / len(adapters)
    assert np.abs(counts - zipf_probabilities(40, 1.0)).max() < 0.02
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_the_uniform_twin_has_as_many_tokens_and_no_unevenness() -> None:
    made = mixed()
    twin = uniform_twin(made)
    assert twin.num_tokens == pytest.approx(made.num_tokens, rel=0.01)
    assert columns(twin)[3] == columns(made)[3]
    assert len(set(columns(twin)[1])) == len(set(columns(twin)[2])) == 1
    assert {(one.rank, one.targets) for one in twin.adapters} == {(16, ALL_LINEAR)}


def test_lognormal_lengths_pile_up_nowhere() -> None:
    lengths = lognormal_lengths(np.random.default_rng(0), 20_000, median=100.0, sigma=1.2, least=8, most=1500)
    assert lengths.min() >= 8
    assert lengths.max() <= 1500
    assert (lengths >= 1499).mean() < 0.001
    assert np.median(lengths) == pytest.approx(100.0, rel=0.05)


def test_prompts_are_repeatable_of_exact_length_and_share_no_beginning() -> None:
    made = mixed(num_requests=20)
    prompts = [made.prompt_tokens(index, 500) for index in range(20)]
    assert prompts == [made.prompt_tokens(index, 500) for index in range(20)]
    assert [len(prompt) for prompt in prompts] == columns(made)[1]
    assert all(16 <= token < 500 for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:6]) for prompt in prompts}) == 20
