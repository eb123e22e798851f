"""The tour ends by itself, shows what it promised, and fails when the server does not do it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from server.demo.scrape import EXPLAINED, samples
from server.demo.tour import take_tour


def test_the_tour_ends_well_and_shows_every_act() -> None:
    printed = io.StringIO()
    assert take_tour(Console(file=printed, width=120)) == 0, printed.getvalue()
    text = printed.getvalue()
    for shown in ("Preheat the oven", "PREHEAT THE OVEN", "Arr, ", '{"dish"', "Préchauffez"):
        assert shown in text
    for shown in ("while swapping", "deleted: asking for it now is refused: HTTP 404", "veneer_steps_total"):
        assert shown in text


def test_the_tour_fails_when_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.demo.household.sys.executable", "false")
    printed = io.StringIO()
    assert take_tour(Console(file=printed)) == 1
    assert "the server ended with code 1" in printed.getvalue()


def test_only_explained_metrics_are_shown_in_the_order_of_their_explanations() -> None:
    scrape = "# HELP x y\nveneer_steps_total 12.0\nother 1\nveneer_generation_tokens_total 1234.0\n"
    assert [(sample.name, sample.value) for sample in samples(scrape)] == [
        ("veneer_generation_tokens_total", "1,234"),
        ("veneer_steps_total", "12"),
    ]
    assert all(explanation for explanation in EXPLAINED.values())
