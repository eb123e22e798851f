"""No cliff: more adapters in use than the device holds, the disk really read.

A fixed number of clients, each with one request at a time, choose adapters by Zipf's law or evenly from a working set
of 1, 2, 4 and 8 times what the device's budget holds; the host tier holds twice the budget. Each point is paired with
the same requests on an engine that holds the whole set. The page cache is emptied of images again and again, so that
what neither tier holds comes from the disk.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.cold_start import drop_from_page_cache
from bench.conditions import conditions
from bench.drive import start_engine
from bench.models import STANDARD, TINY, tickets
from bench.report import Report, Series, flags, progress
from bench.statistics import figure, percentiles
from bench.workloads import AdapterShape
from server.engine.engine import Engine
from server.engine.request import AdapterTicket, EngineRequest, FinishReason, SamplingParams

FACTORS = (1, 2, 4, 8)
POPULARITIES = ("zipf", "uniform")
THROUGHPUT_GOAL, TTFT_GOAL = 0.7, 4.0  # at 4x, Zipf
_IDLE_S = 0.0005
_DROP_EVERY = 8  # requests that end


@dataclass
class Point:
    """One working set under one popularity, on one engine."""

    tokens_per_s: list[float] = field(default_factory=list)  # one a round
    first_token_s: list[float] = field(default_factory=list)
    num_requests: int = 0
    num_loads: int = 0
    num_from_host: int = 0


@dataclass
class House:
    limited: Engine
    resident: Engine
    held: list[AdapterTicket]
    vocab_size: int
    arguments: argparse.Namespace


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=3)
    parser.add_argument("--fit", type=int, default=16, help="adapters that the device's budget holds")
    parser.add_argument("--rank", type=int, default=8, help="of all adapters, on all linears")
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--requests", type=int, default=160, help="of a round")
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--factors", type=int, nargs="+", default=FACTORS, help="working sets, in budgets")
    parser.add_argument("--eviction", choices=("weighed", "lru"), default="weighed")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(fit=2, rank=2, clients=3, requests=8, output_tokens=3, factors=(1, 4), rounds=1)
    house = build(arguments)
    points: dict[tuple[str, int, str], Point] = {}
    for number in range(arguments.rounds):
        for popularity in POPULARITIES:
            for factor in arguments.factors:
                chosen = choices(popularity, factor * arguments.fit, arguments.requests, seed=number)
                engines = {"limited": house.limited, "resident": house.resident}
                for name in list(engines) if number % 2 else reversed(list(engines)):
                    progress(f"round {number + 1}/{arguments.rounds}: {popularity}, {factor}x, {name}")
                    point = points.setdefault((popularity, factor, name), Point())
                    run(house, engines[name], chosen, point)
    progress("")
    deliver(arguments, points)


def build(arguments: argparse.Namespace) -> House:
    """Two engines of this process on one base: with a budget, and with room for everything."""
    shape = TINY if arguments.quick else STANDARD
    pool_bytes = (96 if arguments.quick else 1536) << 20
    number = max(arguments.factors) * arguments.fit
    common: dict[str, Any] = {
        "dtype": "float32", "num_threads": arguments.threads, "pool_bytes": pool_bytes,
        "max_num_seqs": arguments.clients, "adapter_eviction": arguments.eviction,
    }  # fmt: skip
    progress("making adapters")
    resident, description = start_engine(shape, arguments.cache, **common)
    held = tickets(shape, (AdapterShape(arguments.rank),) * number, description, arguments.cache)
    size = -(-held[0].num_bytes // description.unit_bytes) * description.unit_bytes
    limited, _ = start_engine(
        shape,
        arguments.cache,
        **common,
        adapter_bytes=arguments.fit * size,
        host_adapter_bytes=2 * arguments.fit * (-(-held[0].num_bytes // 4096) * 4096),
    )
    for ticket in held:
        resident.load(ticket)
    while resident.has_work:
        resident.step()
        time.sleep(_IDLE_S)
    return House(limited, resident, held, description.vocab_size, arguments)


def choices(popularity: str, num_adapters: int, count: int, seed: int) -> list[int]:
    """Adapters of the requests, in order: rank r with probability proportional to 1/r, or all alike."""
    generator = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, num_adapters + 1) if popularity == "zipf" else np.ones(num_adapters)
    picked: list[int] = generator.choice(num_adapters, count, p=weights / weights.sum()).tolist()
    return picked


def run(house: House, engine: Engine, chosen: list[int], point: Point) -> None:
    """All requests, so many at a time; the next is sent when one ends."""
    arguments = house.arguments
    before = engine.stats()
    waiting = [request_of(house, index, adapter) for index, adapter in enumerate(chosen)][::-1]
    sent_s: dict[str, float] = {}
    num_ended = 0
    start_s = time.perf_counter()
    drop_all(house)
    while waiting or sent_s:
        while waiting and len(sent_s) < arguments.clients:
            request = waiting.pop()
            sent_s[request.request_id] = time.perf_counter()
            engine.submit(request)
        output = engine.step()
        if not output.num_tokens:
            time.sleep(_IDLE_S)
        now_s = time.perf_counter()
        for delta in output.special:
            if delta.finish is FinishReason.FAILED:
                raise RuntimeError(f"request {delta.request_id} failed: {delta.error}")
            if delta.finish is None:
                point.first_token_s.append(now_s - sent_s[delta.request_id])
                continue
            del sent_s[delta.request_id]
            num_ended += 1
            if num_ended % _DROP_EVERY == 0:
                drop_all(house)
    point.tokens_per_s.append(len(chosen) * arguments.output_tokens / (time.perf_counter() - start_s))
    point.num_requests += len(chosen)
    after = engine.stats()
    point.num_loads += after.total_adapter_loads - before.total_adapter_loads
    point.num_from_host += after.total_host_hits - before.total_host_hits


def request_of(house: House, index: int, adapter: int) -> EngineRequest:
    prompt = tuple(2 + (index * 131 + place * 17) % (house.vocab_size - 2) for place in range(32))
    params = SamplingParams(max_new_tokens=house.arguments.output_tokens, ignore_eos=True)
    return EngineRequest(f"r{index}", prompt, params, house.held[adapter])


def drop_all(house: House) -> None:
    for ticket in house.held:
        drop_from_page_cache(ticket)


def deliver(arguments: argparse.Namespace, points: dict[tuple[str, int, str], Point]) -> None:
    shape = TINY if arguments.quick else STANDARD
    size = shape.adapter_parameters(AdapterShape(arguments.rank)) * 4 / 1e6
    facts = conditions(
        budget=f"{arguments.fit} adapters of {size:.1f} MB on the device, {2 * arguments.fit} in the host tier",
        requests=f"{arguments.requests} of 32 + {arguments.output_tokens} tokens, {arguments.clients} at a time",
        eviction=arguments.eviction,
        rounds=arguments.rounds,
    )
    headers = ("popularity", "set", "tok/s", "of resident", "TTFT p50 ms", "of resident", "TTFT p99 ms",
               "loads/request", "from host")  # fmt: skip
    report = Report("over_capacity", facts, headers)
    lines: dict[str, list[float]] = {}
    for popularity in POPULARITIES:
        for factor in arguments.factors:
            limited, resident = points[popularity, factor, "limited"], points[popularity, factor, "resident"]
            rate = float(np.median(limited.tokens_per_s))
            share = rate / float(np.median(resident.tokens_per_s))
            first, last = percentiles([one * 1e3 for one in limited.first_token_s], (50, 99))
            slower = first / percentiles([one * 1e3 for one in resident.first_token_s], (50,))[0]
            per_request = limited.num_loads / limited.num_requests
            from_host = limited.num_from_host / max(1, limited.num_loads)
            report.add((popularity, f"{factor}x", rate, share, first, slower, last, per_request, from_host))
            lines.setdefault(popularity, []).append(share)
            if popularity == "zipf" and factor == 4:
                report.findings.append(
                    f"4x, Zipf: {figure(share)} of the throughput of all-resident (wanted {THROUGHPUT_GOAL}), "
                    f"median time to first token {figure(slower)} times its (wanted {TTFT_GOAL} at most)"
                )
    report.raw = {f"{popularity} {factor}x {name}": vars(point) for (popularity, factor, name), point in points.items()}
    title = "throughput, of all-resident"
    report.deliver(arguments, [Series(title, x=list(arguments.factors), lines=lines, x_title="working set / budget")])


if __name__ == "__main__":
    main()
