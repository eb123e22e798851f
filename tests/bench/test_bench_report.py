"""Tables, intervals and files of the benchmarks say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.conditions import conditions
from bench.report import Report, Series, flags
from bench.statistics import figure, percentiles, ratio_of_medians, ratio_of_pairs, spread, student_95


def test_conditions_name_machine_versions_date_and_commit() -> None:
    found = conditions(dtype="float32")
    assert {"cpu", "cores", "torch_threads", "torch", "transformers", "peft", "commit", "date", "dtype"} <= set(found)
    assert all(str(value) for value in found.values())


def test_a_report_is_a_table_a_json_file_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("sample", conditions(), ("who", "tok/s"))
    report.add(("one", spread([1.0, 2.0, 3.0])))
    report.add(("two", float("nan")))
    report.findings.append("one is faster")
    report.raw["seconds"] = [0.5, float("inf")]
    arguments = flags("A sample.", rounds=3).parse_args(["--json", str(tmp_path / "deep" / "sample.json")])
    bars = Series("bars", ["one"], [2.0], [1.5], [2.5])
    lines = Series("lines", x=[1, 2], lines={"one": [1.0, 2.0]}, x_title="x")
    report.deliver(arguments, [bars, lines])

    text = capsys.readouterr().out
    assert "2 [1.5..2.5]" in text
    assert "one is faster" in text
    data = json.loads((tmp_path / "deep" / "sample.json").read_text())
    assert data["rows"][0] == {"who": "one", "tok/s": {"median": 2.0, "low": 1.5, "high": 2.5}}
    assert data["rows"][1]["tok/s"] is None
    assert data["raw"]["seconds"] == [0.5, None]
    assert (tmp_path / "deep" / "sample.png").read_bytes().startswith(b"\x89PNG")


def test_the_interval_of_paired_ratios_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        machine = rng.lognormal(0.0, 0.3, 10)  # a drift that hits both rounds of a pair
        one, other = (machine * rng.lognormal(0.0, 0.02, 10) for _ in range(2))
        interval = ratio_of_pairs(one.tolist(), other.tolist())
        hits += interval.low <= 1.0 <= interval.high
    assert 0.92 < hits / 400 < 0.98
    drifted = ratio_of_pairs((0.94 * one).tolist(), other.tolist())
    assert drifted.high < 1.0


def test_the_ratio_of_medians_has_an_interval_that_shrinks_with_the_spread() -> None:
    wide = ratio_of_medians([10.0, 12.0, 14.0, 16.0, 18.0], [5.0, 6.0, 7.0, 8.0, 9.0])
    narrow = ratio_of_medians([13.9, 14.0, 14.1], [6.9, 7.0, 7.1])
    assert wide.estimate == pytest.approx(narrow.estimate) == pytest.approx(2.0)
    assert wide.low < narrow.low < 2.0 < narrow.high < wide.high


def test_students_points_are_those_of_the_tables() -> None:
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 19: 2.093, 100: 1.984}
    for freedom, value in known.items():
        assert student_95(freedom) == pytest.approx(value, rel=0.005)


def test_one_pair_gives_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two pairs"):
        ratio_of_pairs([1.0], [2.0])


def test_figures_have_three_digits() -> None:
    assert [figure(value) for value in (0.01234, 1.234, 12.34, 123.4, 12345.6)] == [
        "0.0123",
        "1.23",
        "12.3",
        "123",
        "12,346",
    ]
    assert figure(float("nan")) == "-"
    assert all(value != value for value in percentiles([]))
