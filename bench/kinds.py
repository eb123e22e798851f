"""What each kind of adapter costs a decode step, and whether a batch of all kinds costs more than one of the costliest.

One engine, one process, interleaved rounds in rotating order: 16 requests of 64 + 48 tokens on a base of 69 million
parameters. A round is the base, or 16 different adapters of one kind (LoRA of rank 16 on all projections; IA3; prefixes
of 32 tokens; bottlenecks of 1/16 of the hidden size after attention and feed-forward), or four of each kind together.

Request i of the mixed round uses the same adapter as request i of its kind's own round, so their answers must be equal
token for token; that is counted. Compared are medians of the decode steps of a round, with rounds as pairs, so that
what the machine does to a whole round cancels.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from bench.conditions import conditions
from bench.drive import requests_of, run, start_engine, warm_up
from bench.kind_adapters import KINDS, NUM_VIRTUAL, RANK, REDUCTION, kind_directory
from bench.models import STANDARD, TINY, BaseShape, ticket
from bench.report import Report, Series, flags, progress
from bench.statistics import Interval, figure, ratio_of_pairs, spread
from bench.workloads import BASE, Arrival, Workload
from server.engine.description import EngineDescription
from server.engine.engine import Engine
from server.engine.request import AdapterTicket, EngineRequest

PURE = ("base", *KINDS)
MIXED = "mixed"
GOAL = 1.1  # a mixed step over one of the costliest kind
MB = 1e6


@dataclass(frozen=True, slots=True)
class Sizes:
    shape: BaseShape = STANDARD
    num_requests: int = 16
    num_prompt: int = 64
    num_new: int = 48

    def workload(self, *, has_adapters: bool) -> Workload:
        """All requests at once, request i on ticket i."""
        arrivals = tuple(
            Arrival(0.0, index if has_adapters else BASE, self.num_prompt, self.num_new)
            for index in range(self.num_requests)
        )
        return Workload("kinds", (), arrivals, seed=0)


@dataclass
class Batch:
    """16 requests, and what their rounds gave."""

    workload: Workload
    requests: list[EngineRequest]
    image_mb: float  # of one adapter, on average
    rounds_ms: list[list[float]] = field(default_factory=list)  # decode steps of each round
    tokens: list[list[int]] = field(default_factory=list)  # of the last round

    @property
    def medians_ms(self) -> list[float]:
        return [median(steps) for steps in self.rounds_ms]

    @property
    def steps_ms(self) -> list[float]:
        return [step for steps in self.rounds_ms for step in steps]


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of base and adapters")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(argv)
    sizes = Sizes(TINY, num_prompt=8, num_new=6) if arguments.quick else Sizes()

    engine, description = start_engine(
        sizes.shape,
        arguments.cache,
        lambda stage, _: progress(f"engine: {stage}"),
        dtype=arguments.dtype,
        device=arguments.device,
        num_threads=arguments.threads,
    )
    batches = make_batches(sizes, engine, description, arguments.cache)
    play(engine, sizes, batches, 2 if arguments.quick else arguments.rounds)
    deliver(arguments, sizes, batches)


def make_batches(sizes: Sizes, engine: Engine, description: EngineDescription, cache: Path) -> dict[str, Batch]:
    """Every adapter packed and resident."""
    held: dict[str, list[AdapterTicket]] = {}
    for kind in KINDS:
        progress(f"packing: {kind}")
        directories = [kind_directory(sizes.shape, kind, number, cache) for number in range(sizes.num_requests)]
        held[kind] = [ticket(directory, description) for directory in directories]
        warm_up(engine, held[kind])
    held[MIXED] = [held[kind_of_request(index)][index] for index in range(sizes.num_requests)]
    batches = {"base": _batch(sizes, [], description)}
    return batches | {name: _batch(sizes, tickets, description) for name, tickets in held.items()}


def kind_of_request(index: int) -> str:
    """In the mixed batch."""
    return KINDS[index % len(KINDS)]


def _batch(sizes: Sizes, held: list[AdapterTicket], description: EngineDescription) -> Batch:
    workload = sizes.workload(has_adapters=bool(held))
    image_mb = sum(one.num_bytes for one in held) / len(held) / MB if held else 0.0
    return Batch(workload, requests_of(workload, held, description.vocab_size), image_mb)


def play(engine: Engine, sizes: Sizes, batches: Mapping[str, Batch], rounds: int) -> None:
    """A round before the first is not counted."""
    names = list(batches)
    for number in range(-1, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            progress(f"round {number + 1}/{rounds}: {name}")
            batch = batches[name]
            requests = [replace(one, request_id=str(index)) for index, one in enumerate(batch.requests)]
            result = run(engine, batch.workload, requests)
            batch.tokens = [result.token_ids[str(index)] for index in range(sizes.num_requests)]
            if number >= 0:
                batch.rounds_ms.append(result.step_ms(sizes.num_requests))
    progress("")


def deliver(arguments: argparse.Namespace, sizes: Sizes, batches: Mapping[str, Batch]) -> None:
    facts = conditions(
        dtype=arguments.dtype,
        base=sizes.shape.name,
        adapters=f"LoRA rank {RANK}, prefixes of {NUM_VIRTUAL} tokens, bottlenecks of hidden size / {REDUCTION}",
        requests=f"{sizes.num_requests} of {sizes.num_prompt} + {sizes.num_new} tokens, at once",
        rounds=len(batches["base"].rounds_ms),
    )
    headers = ("16 rows of", "MB an adapter", "decode step ms [quartiles]", "over the base's", "unlike the base")
    report = Report("kinds", facts, headers)
    base = batches["base"]
    for name, batch in batches.items():
        over = "" if name == "base" else ratio_of_pairs(batch.medians_ms, base.medians_ms)
        unlike = sum(one != other for one, other in zip(batch.tokens, base.tokens, strict=True))
        size = figure(batch.image_mb) if batch.image_mb else ""
        report.add((name, size, spread(batch.steps_ms), over, "" if name == "base" else f"{unlike}/{len(base.tokens)}"))
    costliest, ratio = mixed_over_costliest(batches)
    report.findings = [
        f"mixed / {costliest}, the costliest kind alone: {ratio}, wanted at most {GOAL}",
        f"answers of the mixed batch equal to those of their kinds alone: {num_equal(batches)}/{sizes.num_requests}",
    ]
    report.raw = {"decode_ms": {name: batch.rounds_ms for name, batch in batches.items()}}
    spreads = {name: spread(batch.steps_ms) for name, batch in batches.items()}
    bars = Series(
        f"decode step of {sizes.num_requests} rows, ms, {arguments.dtype}",
        list(spreads),
        [one.median for one in spreads.values()],
        [one.low for one in spreads.values()],
        [one.high for one in spreads.values()],
    )
    report.deliver(arguments, [bars])


def mixed_over_costliest(batches: Mapping[str, Batch]) -> tuple[str, Interval]:
    """The kind whose own batch takes longest, and how much longer the mixed one takes."""
    costliest = max(PURE, key=lambda name: median(batches[name].medians_ms))
    return costliest, ratio_of_pairs(batches[MIXED].medians_ms, batches[costliest].medians_ms)


def num_equal(batches: Mapping[str, Batch]) -> int:
    """Requests that were answered with the same tokens among other kinds as among their own."""
    mixed = batches[MIXED].tokens
    return sum(tokens == batches[kind_of_request(index)].tokens[index] for index, tokens in enumerate(mixed))


if __name__ == "__main__":
    main()
