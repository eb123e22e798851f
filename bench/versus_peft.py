"""Throughput against what one could script: transformers, PEFT, and Veneer with no, one, four and sixteen adapters.

One process, interleaved rounds in rotating order, the same weights and the same prompts: 16 requests of 64 + 48 tokens
on a base of 69 million parameters, adapters of rank 16 on all seven projections. Below the table: the ratios that
matter with their intervals, and what sixteen adapters add to a decode step beside the time that reading their bytes
once takes at the bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench import contenders
from bench.conditions import conditions
from bench.contenders import Contender, Timed, Tokens
from bench.drive import requests_of, run, start_engine, warm_up
from bench.machine import read_bandwidth
from bench.models import STANDARD, TINY, BaseShape, adapter_directory, base_directory, tickets
from bench.report import Report, Series, flags, progress
from bench.statistics import figure, ratio_of_medians, spread
from bench.workloads import BASE, AdapterShape, Arrival, Workload
from server.engine.engine import Engine
from server.engine.request import EngineRequest

VENEER = ("veneer 0", "veneer 1", "veneer 4", "veneer 16")  # by number of adapters
EVERYBODY = ("generate", "batching", "mixed", "one by one", *VENEER)
GOALS = {  # dtype -> (numerator, denominator, least ratio)
    "float32": (("mixed", 3.0), ("veneer 0", 0.75), ("one by one", 6.0)),
    "bfloat16": (("mixed", 4.5), ("veneer 0", 0.55), ("one by one", 6.0)),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    shape: BaseShape
    adapter: AdapterShape
    num_adapters: int = 16
    num_requests: int = 16
    num_prompt: int = 64
    num_new: int = 48

    def workload(self, num_used: int) -> Workload:
        """All requests at once, on the first adapters in turn; with none of them on the base."""
        pick = [index % num_used if num_used else BASE for index in range(self.num_requests)]
        arrivals = tuple(Arrival(0.0, adapter, self.num_prompt, self.num_new) for adapter in pick)
        return Workload("uniform", (self.adapter,) * self.num_adapters, arrivals, seed=0)

    def prompts(self) -> Tokens:
        workload = self.workload(0)
        return [workload.prompt_tokens(index, self.shape.vocab) for index in range(self.num_requests)]


class VeneerRounds:
    """One engine that plays all of Veneer's rounds, and keeps the times of its decode steps."""

    def __init__(self, sizes: Sizes, arguments: argparse.Namespace) -> None:
        self.engine: Engine
        config = {"dtype": arguments.dtype, "device": arguments.device, "num_threads": arguments.threads}
        self.engine, description = start_engine(sizes.shape, arguments.cache, _loading, **config)
        workload = sizes.workload(1)
        held = tickets(sizes.shape, workload.adapters, description, arguments.cache)
        warm_up(self.engine, held)
        self.image_bytes = held[0].num_bytes
        self.decode_ms: dict[str, list[float]] = {name: [] for name in VENEER}
        self._sizes = sizes
        self._played: dict[str, tuple[Workload, list[EngineRequest]]] = {}
        for name in VENEER:
            used = sizes.workload(int(name.split()[1]))
            self._played[name] = used, requests_of(used, held, description.vocab_size)

    def contender(self, name: str) -> Contender:
        return Contender(f"Veneer, {name.split()[1]} adapters", lambda: self._round(name))

    def _round(self, name: str) -> Timed:
        result = run(self.engine, *self._played[name])
        self.decode_ms[name] += result.step_ms(self._sizes.num_requests)
        return Timed(result.total_s, [result.token_ids[str(index)] for index in range(self._sizes.num_requests)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=5)
    parser.add_argument("--dtype", choices=tuple(GOALS), default="float32", help="of the base, everywhere")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=EVERYBODY, default=EVERYBODY, help="who takes part")
    arguments = parser.parse_args(argv)
    sizes = (
        Sizes(TINY, AdapterShape(4), num_prompt=8, num_new=4) if arguments.quick else Sizes(STANDARD, AdapterShape(16))
    )

    veneer = VeneerRounds(sizes, arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    field = {name: one for name, one in enter(sizes, arguments, veneer).items() if name in arguments.only}
    for name, contender in field.items():
        progress(f"warming up: {name}")
        contender.run()
    for times in veneer.decode_ms.values():
        times.clear()
    seconds, tokens = play(field, 2 if arguments.quick else arguments.rounds)
    deliver(sizes, arguments, veneer, field, seconds, tokens)


def enter(sizes: Sizes, arguments: argparse.Namespace, veneer: VeneerRounds) -> dict[str, Contender]:
    """Everybody, on models of their own; what nobody needs is not loaded."""
    directory = base_directory(sizes.shape, arguments.cache)
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    prompts, new, number = sizes.prompts(), sizes.num_new, sizes.num_adapters
    field: dict[str, Contender] = {}
    if "generate" in arguments.only:
        field["generate"] = contenders.generate(contenders.plain_model(directory, dtype, device), prompts, new)
    if "batching" in arguments.only:
        model = contenders.plain_model(directory, dtype, device)
        field["batching"] = contenders.continuous_batching(model, prompts, new)
    if {"mixed", "one by one"} & set(arguments.only):
        paths = [adapter_directory(sizes.shape, sizes.adapter, index, arguments.cache) for index in range(number)]
        adapted = contenders.adapted_model(directory, paths, dtype, device)
        field["mixed"] = contenders.peft_mixed(adapted, prompts, new, number)
        field["one by one"] = contenders.peft_one_by_one(adapted, prompts, new, number)
    return field | {name: veneer.contender(name) for name in VENEER}


def play(field: dict[str, Contender], rounds: int) -> tuple[dict[str, list[float]], dict[str, Tokens]]:
    """Seconds of every round, and the last tokens, by contender."""
    seconds: dict[str, list[float]] = {name: [] for name in field}
    tokens: dict[str, Tokens] = {}
    names = list(field)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            progress(f"round {number + 1}/{rounds}: {field[name].name}")
            taken = field[name].run()
            seconds[name].append(taken.seconds)
            tokens[name] = taken.tokens
    progress("")
    return seconds, tokens


def deliver(
    sizes: Sizes,
    arguments: argparse.Namespace,
    veneer: VeneerRounds,
    field: dict[str, Contender],
    seconds: dict[str, list[float]],
    tokens: dict[str, Tokens],
) -> None:
    num_tokens = sizes.num_requests * sizes.num_new
    rates = {name: [num_tokens / one for one in times] for name, times in seconds.items()}
    facts = conditions(
        dtype=arguments.dtype,
        base=sizes.shape.name,
        adapters=f"rank {sizes.adapter.rank} on {len(sizes.adapter.targets)} projections",
        requests=f"{sizes.num_requests} of {sizes.num_prompt} + {sizes.num_new} tokens, at once",
        rounds=len(next(iter(seconds.values()))),
    )
    report = Report(
        "versus_peft", facts, ("contender", "output tok/s [quartiles]", "decode step ms [quartiles]", "tokens")
    )
    for name, contender in field.items():
        steps = veneer.decode_ms.get(name)
        report.add((contender.name, spread(rates[name]), spread(steps) if steps else "", _agreement(name, tokens)))
    report.findings = [*_ratios(arguments.dtype, rates), *_added(sizes, veneer)]
    report.raw = {"seconds": seconds, "decode_ms": veneer.decode_ms}
    spreads = [spread(rates[name]) for name in field]
    labels = [contender.name for contender in field.values()]
    lows, highs = [one.low for one in spreads], [one.high for one in spreads]
    title = f"output tokens/s, {arguments.dtype}"
    report.deliver(arguments, [Series(title, labels, [one.median for one in spreads], lows, highs)])


def _ratios(dtype: str, rates: dict[str, list[float]]) -> list[str]:
    goals = [("veneer 16", other, least) for other, least in GOALS[dtype]] + [("veneer 0", "generate", 1.5)]
    return [
        f"{top} / {bottom}: {ratio_of_medians(rates[top], rates[bottom])}, wanted {least}"
        for top, bottom, least in goals
        if top in rates and bottom in rates
    ]


def _added(sizes: Sizes, veneer: VeneerRounds) -> list[str]:
    """What the adapters cost a decode step, and what reading them once would cost."""
    with_, without = veneer.decode_ms["veneer 16"], veneer.decode_ms["veneer 0"]
    if not (with_ and without):
        return []
    bandwidth = read_bandwidth()
    added_ms = spread(with_).median - spread(without).median
    bytes_read = sizes.num_adapters * veneer.image_bytes
    floor_ms = bytes_read / bandwidth * 1e3
    finding = (
        f"{sizes.num_adapters} adapters add {figure(added_ms)} ms to a decode step; reading their "
        f"{bytes_read / 1e6:.1f} MB once at {bandwidth / 1e9:.1f} GB/s takes {figure(floor_ms)} ms: "
        f"{figure(added_ms / floor_ms)} times as long, {figure(added_ms - floor_ms)} ms more"
    )
    return [finding]


def _agreement(name: str, tokens: dict[str, Tokens]) -> str:
    """How many answers equal those of the oracle on the same work; in bfloat16 rounding decides some."""
    oracle = {"veneer 0": "generate", "batching": "generate", "veneer 16": "mixed", "one by one": "mixed"}.get(name, "")
    if oracle not in tokens:
        return ""
    same = sum(one == other for one, other in zip(tokens[name], tokens[oracle], strict=True))
    return f"{same}/{len(tokens[name])} as {oracle}"


def _loading(stage: str, fraction: float) -> None:
    progress(f"engine: {stage}")


if __name__ == "__main__":
    main()
