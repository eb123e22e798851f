"""The tour ends by itself, shows what it promised, and fails when the server does not do it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from server.demo import EXAMPLE_PROMPT
from server.demo.scrape import EXPLAINED, read_out
from server.demo.tour import take_tour
from server.demo.visitor import Visitor


def test_the_tour_ends_well_and_shows_every_act() -> None:
    printed = io.StringIO()
    assert take_tour(Console(file=printed, width=120)) == 0, printed.getvalue()
    text = printed.getvalue()
    for shown in ("Preheat the oven", "PREHEAT THE OVEN", "Arr, ", '{"dish"', "Préchauffez"):
        assert shown in text
    for shown in ("LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "IA3", "LOHA", "VERA", "TRAINABLE_TOKENS"):
        assert f" {shown} " in text
    assert "answers right: the voice asked for, and every number" in text
    for shown in ("while swapping", "deleted: asking for it now is refused: HTTP 404", "veneer_steps_total"):
        assert shown in text


def test_the_tour_fails_when_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.demo.household.sys.executable", "false")
    printed = io.StringIO()
    assert take_tour(Console(file=printed)) == 1
    assert "the server ended with code 1" in printed.getvalue()


def test_explained_metrics_are_read_out_in_order_and_by_label() -> None:
    scrape = (
        "# HELP x y\nveneer_steps_total 12.0\nother 1\nveneer_generation_tokens_total 1234.0\n"
        'veneer_adapter_requests_total{adapter="json",outcome="served"} 3.0\n'
        'veneer_adapter_requests_total{adapter="shout",outcome="served"} 4.0\n'
        'vllm:lora_requests_info{max_lora="8",running_lora_adapters="json,shout",waiting_lora_adapters=""} 1.7e9\n'
    )
    assert [(line.family, line.value) for line in read_out(scrape)] == [
        ("veneer_generation_tokens_total", "1,234"),
        ("veneer_steps_total", "12"),
        ("veneer_adapter_requests_total", "json 3, shout 4"),
        ("vllm:lora_requests_info", "json,shout"),
    ]


def test_every_explained_metric_is_one_that_the_server_tells(visitor: Visitor) -> None:
    visitor.generate(EXAMPLE_PROMPT, "json", max_new_tokens=4)
    visitor.evict("json")
    assert [line.family for line in read_out(visitor.metrics())] == list(EXPLAINED)
