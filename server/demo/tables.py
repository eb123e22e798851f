"""What the tour prints as tables: answers, kinds of adapters, and the pace of streams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from server.demo import ADAPTER_REGISTERS
from server.demo.readers import Pace

_COLOURS = {
    "pirate": "yellow",
    "shout": "red",
    "french": "blue",
    "json": "green",
    "list": "magenta",
    "bard": "bright_yellow",
    "robot": "cyan",
    "telegram": "bright_blue",
}


class Heard(NamedTuple):
    """One answer of a batch in which all speak at once."""

    speaker: str
    kind: str  # as the server read it from the adapter's files; "" for the base
    forms: Sequence[str]  # what the server made of it
    answer: str
    is_right: bool


def answers_table(answers: Mapping[str, str]) -> RenderableType:
    table = Table(show_header=False, show_lines=True, box=box.SIMPLE, padding=(0, 1))
    for name, answer in answers.items():
        table.add_row(_coloured(name), escape(answer))
    return table


def kinds_table(all_heard: Iterable[Heard]) -> RenderableType:
    """A line for each answer, cut where the terminal ends."""
    table = Table(box=box.SIMPLE, expand=True)
    lines = [(heard, ", ".join(heard.forms)) for heard in all_heard]
    widest = (
        ("adapter", max(len(heard.speaker) for heard, _ in lines)),
        ("kind", max(len(heard.kind) for heard, _ in lines)),
        ("becomes", max(len(forms) for _, forms in lines)),
        ("judge", len("right")),
    )
    for heading, width in widest:
        table.add_column(heading, min_width=width, no_wrap=True)
    table.add_column("answer", ratio=1, no_wrap=True, overflow="ellipsis")
    for heard, forms in lines:
        verdict = "[green]right[/]" if heard.is_right else "[red]wrong[/]"
        answer = escape(" / ".join(heard.answer.splitlines()))
        table.add_row(_coloured(heard.speaker), escape(heard.kind), forms, verdict, answer)
    return table


def pace_table(before: Pace, during: Pace) -> RenderableType:
    table = Table(box=box.SIMPLE, title="Time between two tokens of a running stream", title_justify="left")
    for heading in ("", "median", "95th percentile", "worst", "tokens"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, pace in (("undisturbed", before), ("while swapping", during)):
        times = (f"{value:.1f} ms" for value in (pace.median_ms, pace.p95_ms, pace.worst_ms))
        table.add_row(name, *times, f"{pace.num_gaps:,}")
    return table


def _coloured(speaker: str) -> str:
    return f"[bold {_COLOURS.get(ADAPTER_REGISTERS.get(speaker, ''), 'white')}]{escape(speaker)}[/]"
