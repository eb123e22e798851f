"""Counts and histograms as plain numbers; whoever exposes them renders them (this file knows no exposition format).

One event loop owns them, so nothing here is locked. An observation costs a bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

# The bounds of the vLLM dashboards, so that their quantiles compare.
FIRST_TOKEN_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_GAP_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS_BOUNDS = (1.0, *(float(2**power) for power in range(3, 15)))
SEQUENCES_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0)
ADAPTERS_BOUNDS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


def token_bounds(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to the model's length."""
    bounds: list[float] = []
    for exponent in range(12):
        for digit in (1, 2, 5):
            value = digit * 10**exponent
            if value > max_model_len:
                return tuple(bounds)
            bounds.append(float(value))
    return tuple(bounds)


class Histogram:
    """Counts of observations at or below each bound (not cumulated), and those over the last."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0  # sum of all observed values

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulated(self) -> list[tuple[float, int]]:
        """(bound, observations at or below it), ascending; the last bound is infinity."""
        running, pairs = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            pairs.append((bound, running))
        return pairs


@dataclass(slots=True)
class EngineMetrics:
    """What the engine's door sees pass: kept by the client across restarts of the engine."""

    first_token_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS_S))
    token_gap_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_GAP_BOUNDS_S))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS_BOUNDS))
    step_adapters: Histogram = field(default_factory=lambda: Histogram(ADAPTERS_BOUNDS))  # one sample a snapshot
    adapter_events: Counter[str] = field(default_factory=Counter)  # by state: device, failed, disk


@dataclass(slots=True)
class AdapterCounts:
    """Totals of one adapter name, and its requests in flight."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_in_flight: int = 0


class RequestMetrics:
    """One observation of each a finished request; `adapters` is keyed by name, "" is the base."""

    def __init__(self, max_model_len: int) -> None:
        tokens = token_bounds(max_model_len)
        self.total_s = Histogram(REQUEST_BOUNDS_S)
        self.queue_s = Histogram(REQUEST_BOUNDS_S)
        self.inference_s = Histogram(REQUEST_BOUNDS_S)
        self.prefill_s = Histogram(REQUEST_BOUNDS_S)
        self.decode_s = Histogram(REQUEST_BOUNDS_S)
        self.per_token_s = Histogram(TOKEN_GAP_BOUNDS_S)
        self.num_prompt_tokens = Histogram(tokens)
        self.num_generated_tokens = Histogram(tokens)
        self.max_new_tokens = Histogram(tokens)
        self.num_sequences = Histogram(SEQUENCES_BOUNDS)
        self.outcomes: Counter[str] = Counter()  # length, eos_token, stop_sequence, aborted, failed
        self.num_rejected = 0  # told that the queue is full
        self.adapters: dict[str, AdapterCounts] = {}

    def of_adapter(self, name: str) -> AdapterCounts:
        return self.adapters.setdefault(name, AdapterCounts())

    def forget_adapter(self, name: str) -> None:
        """The adapter was deleted: its totals go, unless requests of it still run."""
        counts = self.adapters.get(name)
        if counts is not None and counts.num_in_flight == 0:
            del self.adapters[name]
