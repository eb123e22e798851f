"""Uneven work against even work: is a token as cheap when everything about the requests differs?

`mixed` (lengths from 8 to 1,500 and one neighbour of 4,096 tokens, ranks from 4 to 64, targets that differ, Zipf
popularity, Poisson arrivals) against its uniform twin (same number of requests and tokens, same arrivals, mean
lengths, rank 16 on all projections), in interleaved rounds on one engine. Throughput is tokens computed, prompts
included, a second of steps.

Pauses between tokens are compared with what the work of their steps explains: a cost model (one term a step, a
decoding row, a prompt token, and a token of context for each of the two) is fitted to runs without company (the twin,
the neighbour alone, the first requests of `mixed` one after another), then asked about the steps of `mixed`. An actual
step much longer than that would be a row that suffers from its neighbours beyond their share of work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.conditions import conditions
from bench.drive import Run, requests_of, run, start_engine, warm_up
from bench.models import STANDARD, TINY, tickets
from bench.report import Report, Series, flags, progress
from bench.statistics import figure, percentiles, ratio_of_medians, spread
from bench.step_records import StepParts, watching
from bench.workloads import Workload, mixed, uniform_twin
from server.engine.engine import Engine
from server.engine.request import AdapterTicket

GOAL = 0.8  # of the twin's throughput a token


@dataclass
class Side:
    """One workload with its adapters, and what its rounds gave."""

    workload: Workload
    held: list[AdapterTicket]
    runs: list[Run] = field(default_factory=list)
    steps: list[StepParts] = field(default_factory=list)

    def rates(self) -> list[float]:
        return [self.workload.num_tokens / one.busy_s for one in self.runs]

    def gaps_ms(self) -> list[float]:
        return [gap * 1e3 for one in self.runs for gap in one.gaps_s()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--neighbour", type=int, default=4096, help="tokens of the one long prompt")
    parser.add_argument("--running", type=int, default=32, help="sequences that may run at once")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(requests=8, rate=100.0, adapters=5, neighbour=600, rounds=2)
    shape = TINY if arguments.quick else STANDARD

    config: dict[str, Any] = {
        "dtype": arguments.dtype,
        "max_num_seqs": arguments.running,
        "num_threads": arguments.threads,
    }
    engine, description = start_engine(shape, arguments.cache, lambda stage, _: progress(f"engine: {stage}"), **config)
    uneven = mixed(
        num_requests=arguments.requests,
        rate=arguments.rate,
        num_adapters=arguments.adapters,
        neighbour_tokens=arguments.neighbour,
    )
    sides = {}
    for name, workload in (("mixed", uneven), ("uniform twin", uniform_twin(uneven))):
        progress(f"packing the adapters of the {name} workload")
        sides[name] = Side(workload, tickets(shape, workload.adapters, description, arguments.cache))
        warm_up(engine, sides[name].held)
    play(engine, sides, description.vocab_size, arguments.rounds)
    alone = lonely_steps(engine, sides["mixed"], description.vocab_size, 4 if arguments.quick else 24)
    deliver(arguments, sides, step_cost([*sides["uniform twin"].steps, *alone]))


def play(engine: Engine, sides: dict[str, Side], vocab_size: int, rounds: int) -> None:
    for number in range(rounds):
        for name, side in sides.items():
            progress(f"round {number + 1}/{rounds}: {name}, {len(side.workload.arrivals)} requests")
            with watching() as records:
                side.runs.append(run(engine, side.workload, requests_of(side.workload, side.held, vocab_size)))
            side.steps.extend(records)
    progress("")


def lonely_steps(engine: Engine, side: Side, vocab_size: int, number: int) -> list[StepParts]:
    """The steps of the longest request and of the first `number` ones, each alone in the engine."""
    requests = requests_of(side.workload, side.held, vocab_size)
    longest = max(range(len(requests)), key=lambda index: len(requests[index].token_ids))
    steps: list[StepParts] = []
    for index in [longest, *range(number)]:
        progress(f"alone: request {index}")
        single = replace(side.workload, arrivals=(replace(side.workload.arrivals[index], arrival_s=0.0),))
        with watching() as records:
            run(engine, single, [requests[index]])
        steps.extend(records)
    progress("")
    return steps


def step_cost(steps: list[StepParts]) -> NDArray[np.float64]:
    """Seconds for each column of `work_matrix`: least squares on relative errors, none negative.

    A term that comes out negative is dropped and the others are fitted again.
    """
    work, seconds = work_matrix(steps), np.array([one.step_s for one in steps])
    cost = np.zeros(work.shape[1])
    used = work.any(axis=0)
    while True:
        scaled = work[:, used] / seconds[:, None]
        fitted = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0]
        cost[:] = 0.0
        cost[used] = fitted
        if (cost >= 0.0).all():
            return cost
        used &= cost >= 0.0


def work_matrix(steps: list[StepParts]) -> NDArray[np.float64]:
    """[steps, 5]: one, decoding rows, their context, prompt tokens, their context."""
    return np.array([(1, *one.work) for one in steps], dtype=np.float64)


def deliver(arguments: argparse.Namespace, sides: dict[str, Side], cost: NDArray[np.float64]) -> None:
    facts = conditions(
        dtype=arguments.dtype,
        requests=f"{arguments.requests} at {arguments.rate}/s, {arguments.running} may run at once",
        tokens={name: side.workload.num_tokens for name, side in sides.items()},
        rounds=arguments.rounds,
    )
    headers = ("workload", "tokens/s of steps [quartiles]", "gap ms p50", "p90", "p99", "actual / explained p50", "p99")
    report = Report("mixed", facts, headers)
    beyond: dict[str, NDArray[np.float64]] = {}
    for name, side in sides.items():
        decoding = [one for one in side.steps if one.work.decode_rows]
        beyond[name] = np.array([one.step_s for one in decoding]) / (work_matrix(decoding) @ cost)
        gaps = [round(gap, 2) for gap in percentiles(side.gaps_ms())]
        report.add(
            (name, spread(side.rates()), *gaps, *(float(one) for one in percentiles(list(beyond[name]), [50, 99])))
        )
    ratio = ratio_of_medians(sides["mixed"].rates(), sides["uniform twin"].rates())
    terms = ("a step", "a decoding row", "a token of its context", "a prompt token", "a token of its context")
    report.findings = [
        f"throughput per token computed, mixed / uniform: {ratio}, wanted {GOAL}",
        "cost model, microseconds: "
        + ", ".join(f"{term} {figure(one * 1e6)}" for term, one in zip(terms, cost, strict=True)),
    ]
    report.raw = {
        name: {"rates": side.rates(), "total_s": [one.total_s for one in side.runs], "beyond": beyond[name].tolist()}
        for name, side in sides.items()
    }
    rates = {name: spread(side.rates()) for name, side in sides.items()}
    bars = Series(
        "tokens computed a second of steps",
        list(rates),
        [one.median for one in rates.values()],
        [one.low for one in rates.values()],
        [one.high for one in rates.values()],
    )
    points = list(range(1, 100))
    lines = {name: percentiles(side.gaps_ms(), points) for name, side in sides.items()}
    report.deliver(arguments, [bars, Series("gap between tokens, ms", x=points, lines=lines, x_title="percentile")])


if __name__ == "__main__":
    main()
