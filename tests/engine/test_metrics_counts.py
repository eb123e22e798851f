"""Histograms count what they say."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from server.engine.metrics import Histogram, RequestMetrics, token_bounds


@given(st.lists(st.floats(0, 20), max_size=50))
def test_a_value_counts_in_every_bucket_whose_bound_it_does_not_exceed(values: list[float]) -> None:
    histogram = Histogram((1.0, 5.0, 10.0))
    for value in values:
        histogram.observe(value)
    for bound, count in histogram.cumulated():
        assert count == bisect_left(sorted(values), float(f"{bound}")) + values.count(bound)
    assert histogram.count == len(values)
    assert abs(histogram.total - sum(values)) < 1e-6


def test_one_observation_may_stand_for_several_tokens() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(0.25, times=4)
    assert (histogram.count, histogram.total) == (4, 1.0)


def test_token_bounds_go_up_to_the_model_length() -> None:
    assert token_bounds(60) == (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def test_a_deleted_adapter_leaves_unless_it_still_runs() -> None:
    metrics = RequestMetrics(100)
    metrics.of_adapter("sql").num_in_flight = 1
    metrics.forget_adapter("sql")
    assert "sql" in metrics.adapters
    metrics.of_adapter("sql").num_in_flight = 0
    metrics.forget_adapter("sql")
    assert metrics.adapters == {}
