"""What the engine's own work costs a step: schedule, build, post-process; the model and the choice of tokens excluded.

64 and 256 running sequences on 64 adapters, on bases of 4, 12 and 24 layers. The bases are narrow, since host time
does not depend on their width, and a step of theirs is short. Only steps in which every sequence decodes count.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.conditions import conditions
from bench.drive import requests_of, run, start_engine, warm_up
from bench.models import BaseShape, tickets
from bench.report import Report, Series, flags, progress
from bench.statistics import figure, percentiles, spread
from bench.step_records import StepParts, watching
from bench.workloads import AdapterShape, Arrival, Workload
from server.engine.engine import Engine
from server.engine.request import AdapterTicket

GOAL_MS = 2.0  # at 256 sequences


class Setting(NamedTuple):
    num_layers: int
    num_sequences: int


class Loaded(NamedTuple):
    engine: Engine
    held: list[AdapterTicket]
    vocab_size: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=5)
    parser.add_argument("--layers", type=int, nargs="+", default=(4, 12, 24))
    parser.add_argument("--sequences", type=int, nargs="+", default=(64, 256))
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64, help="decode steps a round, about")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(layers=(2, 4), sequences=(4, 8), adapters=4, output_tokens=6, rounds=2)

    engines = {layers: load(layers, arguments) for layers in arguments.layers}
    steps: dict[Setting, list[StepParts]] = {}
    for number in range(arguments.rounds):
        for layers, loaded in engines.items():
            for sequences in arguments.sequences:
                progress(f"round {number + 1}/{arguments.rounds}: {layers} layers, {sequences} sequences")
                setting = Setting(layers, sequences)
                steps.setdefault(setting, []).extend(decode_steps(loaded, sequences, arguments))
    progress("")
    deliver(arguments, steps)


def load(num_layers: int, arguments: argparse.Namespace) -> Loaded:
    progress(f"loading {num_layers} layers")
    shape = BaseShape(hidden=64, layers=num_layers, intermediate=128, heads=4, kv_heads=2, vocab=512, max_position=2048)
    most = max(arguments.sequences)
    config: dict[str, Any] = {"dtype": "float32", "max_num_seqs": most, "num_threads": arguments.threads}
    engine, description = start_engine(shape, arguments.cache, **config)
    held = tickets(shape, (AdapterShape(4),) * arguments.adapters, description, arguments.cache)
    warm_up(engine, held)
    return Loaded(engine, held, description.vocab_size)


def decode_steps(loaded: Loaded, num_sequences: int, arguments: argparse.Namespace) -> list[StepParts]:
    """The steps of one round in which all sequences decode."""
    arrivals = tuple(
        Arrival(0.0, index % arguments.adapters, 16, arguments.output_tokens + 8) for index in range(num_sequences)
    )
    workload = Workload("host time", (AdapterShape(4),) * arguments.adapters, arrivals, seed=0)
    with watching() as records:
        run(loaded.engine, workload, requests_of(workload, loaded.held, loaded.vocab_size))
    return [one for one in records if one.work.decode_rows == num_sequences and not one.work.prefill_tokens]


def deliver(arguments: argparse.Namespace, steps: dict[Setting, list[StepParts]]) -> None:
    facts = conditions(adapters=arguments.adapters, base="hidden 64, vocabulary 512", rounds=arguments.rounds)
    headers = ("layers", "sequences", "steps", "host ms [quartiles]", "p99", "sampling ms", "model ms", "whole step ms")
    report = Report("host_time", facts, headers)
    medians: dict[Setting, float] = {}
    for setting, records in sorted(steps.items()):
        host = [one.host_s * 1e3 for one in records]
        medians[setting] = spread(host).median
        others = [
            spread([getattr(one, part) * 1e3 for one in records]).median for part in ("sample_s", "forward_s", "step_s")
        ]
        report.add((*setting, len(records), spread(host), percentiles(host, [99])[0], *others))
    most = max(arguments.sequences)
    at_most = {setting.num_layers: median for setting, median in medians.items() if setting.num_sequences == most}
    growth = max(at_most.values()) / min(at_most.values())
    report.findings = [
        f"at {most} sequences: {figure(max(at_most.values()))} ms at most, wanted {GOAL_MS} ms at 256",
        f"from {min(at_most)} to {max(at_most)} layers host time changes by a factor of {figure(growth)}",
    ]
    report.raw = {f"{setting}": [one.host_s for one in records] for setting, records in steps.items()}
    lines = {
        f"{sequences} sequences": [medians[Setting(layers, sequences)] for layers in sorted(arguments.layers)]
        for sequences in arguments.sequences
    }
    title = "host time of a step, ms"
    report.deliver(arguments, [Series(title, x=sorted(arguments.layers), lines=lines, x_title="layers")])


if __name__ == "__main__":
    main()
