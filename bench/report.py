"""What every benchmark has in common: its flags, its table, its JSON and its plot.

Running example:
    report = Report("versus_peft", conditions(dtype="float32"), ("contender", "tok/s"))
    report.add(("generate", spread([250.0, 257.0, 262.0])))
    report.deliver(arguments, series=[Series("tok/s", ["generate"], [257.0])])
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.statistics import figure


class Series(NamedTuple):
    """One panel of a plot: bars over labels, or, where `x` is given, a line for each entry of `lines`."""

    title: str
    labels: Sequence[str] = ()
    values: Sequence[float] = ()
    lows: Sequence[float] = ()  # with `highs`: whiskers of the bars
    highs: Sequence[float] = ()
    x: Sequence[float] = ()
    lines: Mapping[str, Sequence[float]] | None = None
    x_title: str = ""


@dataclass
class Report:
    """A table under its conditions; cells are text, numbers, or anything whose str() reads well."""

    name: str
    conditions: dict[str, object]
    headers: tuple[str, ...]
    rows: list[tuple[object, ...]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)  # sentences below the table
    raw: dict[str, Any] = field(default_factory=dict)  # every measurement, for JSON only

    def add(self, row: tuple[object, ...]) -> None:
        assert len(row) == len(self.headers), "a row has one cell a column"
        self.rows.append(row)

    def deliver(self, arguments: argparse.Namespace, series: Sequence[Series] = ()) -> None:
        """Print the table; write JSON and plot where the flags say so."""
        print(self.text())
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(self.data(), indent=1, allow_nan=False) + "\n")
            print(f"measurements: {arguments.json}")
        plot = arguments.plot or (arguments.json and arguments.json.with_suffix(".png"))
        if plot is not None and series:
            draw_plot(plot, f"{self.name}: {self.conditions['cpu']}, {self.conditions['date']}", series)
            print(f"plot: {plot}")

    def text(self) -> str:
        facts = "\n".join(f"  {name:<14}{value}" for name, value in self.conditions.items())
        cells = [list(self.headers), *[[_cell(value) for value in row] for row in self.rows]]
        widths = [max(len(line[column]) for line in cells) for column in range(len(self.headers))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.name, facts, "", lines[0], rule, *lines[1:], "", *self.findings])

    def data(self) -> dict[str, Any]:
        """Everything as plain JSON data; NaN and infinities become null."""
        rows = [dict(zip(self.headers, row, strict=True)) for row in self.rows]
        return {
            "name": self.name,
            "conditions": self.conditions,
            "rows": _plain(rows),
            "findings": self.findings,
            "raw": _plain(self.raw),
        }


def draw_plot(path: Path, title: str, series: Sequence[Series]) -> None:
    from matplotlib.figure import Figure  # heavy, and only needed here

    canvas = Figure(figsize=(6.0 * len(series), 4.5), layout="constrained")
    canvas.suptitle(title, fontsize=9)
    for axes, one in zip(canvas.subplots(1, len(series), squeeze=False)[0], series, strict=True):
        axes.set_title(one.title, fontsize=10)
        if one.lines is not None:
            for label, values in one.lines.items():
                axes.plot(one.x, values, marker="o", label=label)
            axes.set_xlabel(one.x_title)
            axes.set_ylim(bottom=0)
            axes.legend()
            continue
        whiskers = None
        if one.lows:
            below = [max(0.0, value - low) for value, low in zip(one.values, one.lows, strict=True)]
            above = [max(0.0, high - value) for value, high in zip(one.values, one.highs, strict=True)]
            whiskers = [below, above]
        axes.barh(range(len(one.labels)), one.values, xerr=whiskers, capsize=3)
        axes.set_yticks(range(len(one.labels)), one.labels)
        axes.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)


def flags(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """The flags that every benchmark knows; each adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw there; default: beside the JSON file")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, not how fast")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=Path.home() / ".cache" / "veneer-bench",
        help="where models and adapters made for benchmarks are kept",
    )
    return parser


def progress(text: str) -> None:
    """One line on stderr: overwritten on a terminal, a line of its own in a log."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
    else:
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _cell(value: object) -> str:
    return figure(value) if isinstance(value, float) and not isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
