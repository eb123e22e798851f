"""Medians with their spread, and intervals of ratios of paired rounds. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 10_000


class Spread(NamedTuple):
    """Repeated measurements of one thing."""

    median: float
    low: float  # 25th percentile
    high: float  # 75th percentile

    def __str__(self) -> str:
        return f"{figure(self.median)} [{figure(self.low)}..{figure(self.high)}]"


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} (95 %: {self.low:.3f}..{self.high:.3f})"


def spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return Spread(median, low, high)


def ratio_of_pairs(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """The mean ratio of paired rounds, by the geometric mean; interval by Student's t on the logarithms.

    A drift of the machine that hits both rounds of a pair alike cancels.

    Raises:
        ValueError: fewer than two pairs, or sequences of unequal length.
    """
    logs = np.log([one / other for one, other in zip(numerators, denominators, strict=True)])
    if len(logs) < 2:
        raise ValueError(f"an interval needs at least two pairs, not {len(logs)}")
    reach = student_95(len(logs) - 1) * float(logs.std(ddof=1)) / len(logs) ** 0.5
    mean = float(logs.mean())
    return Interval(*np.exp([mean, mean - reach, mean + reach]).tolist())


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """The ratio of two medians; interval by the percentile bootstrap over rounds."""
    rng = np.random.default_rng(seed)
    tops, bottoms = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    resampled = [np.median(rng.choice(side, (_RESAMPLES, len(side))), axis=1) for side in (tops, bottoms)]
    low, high = np.percentile(resampled[0] / resampled[1], [2.5, 97.5]).tolist()
    return Interval(float(np.median(tops) / np.median(bottoms)), low, high)


def percentiles(values: Sequence[float], wanted: Sequence[float] = (50, 90, 99)) -> list[float]:
    """NaN for each when there are no values."""
    if not len(values):
        return [float("nan")] * len(wanted)
    found: list[float] = np.percentile(values, wanted).tolist()
    return found


def student_95(freedom: int) -> float:
    """The two-sided 95 % point of Student's t (Cornish-Fisher series about the normal; exact to 0.5 % from 3 on)."""
    table = {1: 12.706, 2: 4.303, 3: 3.182}
    if freedom in table:
        return table[freedom]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def figure(value: float) -> str:
    """Three significant digits, without an exponent for the sizes that people measure."""
    if value != value:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
