"""The whole server under load: latencies of an open loop, and what HTTP costs beside the engine called directly.

    s_lora   open loop: S-LoRA's trace (uniform or skewed popularity, Gamma arrivals)
    mixed    open loop: very unequal lengths, ranks and targets, Zipf popularity, one neighbour of 4,096 tokens
    direct   closed loop: 64 concurrent streams through HTTP against the same through the engine's async door,
             in interleaved rounds with both engines alive

Latencies count from when a request was due. Against a server that runs already (--url) lengths are those of its own
tokenizer only if it serves the benchmarks' base; adapters are then named with --adapter.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from bench.conditions import conditions
from bench.drive import requests_of
from bench.http_load import Load, bodies, send
from bench.models import STANDARD, TINY, BaseShape, adapter_directory, base_directory, tickets
from bench.report import Report, Series, flags, progress
from bench.server_process import ServerProcess
from bench.statistics import percentiles, ratio_of_pairs, spread
from bench.workloads import AdapterShape, Arrival, Workload, mixed, s_lora
from server.engine.client import EngineClient
from server.engine.config import EngineConfig
from server.engine.request import AdapterTicket, EngineRequest

PARTS = ("s_lora", "mixed", "direct")
ATTAINED_S = 6.0  # S-LoRA's bound for the first token
GOAL = 0.9  # of the engine's throughput
NUM_STREAMS, NUM_ADAPTERS = 64, 16


class Pair(NamedTuple):
    """Output tokens a second."""

    by_http: float
    by_engine: float


@dataclass(frozen=True, slots=True)
class Sizes:
    shape: BaseShape
    adapter: AdapterShape
    num_prompt: int
    num_new: int
    num_streams: int

    def streams(self, seed: int) -> Workload:
        """All at once; another seed is other prompts, so that no prefix is cached."""
        arrivals = tuple(
            Arrival(0.0, index % NUM_ADAPTERS, self.num_prompt, self.num_new) for index in range(self.num_streams)
        )
        return Workload("direct", (self.adapter,) * NUM_ADAPTERS, arrivals, seed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--url", help="a server that runs already; default: one is started")
    parser.add_argument("--adapter", nargs="+", default=[], metavar="NAME", help="adapters of the server at --url")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second of the open loops")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals of the open loops")
    parser.add_argument("--adapters", type=int, default=20, help="adapters of s_lora")
    parser.add_argument("--alpha", type=float, default=1.0, help="popularity of s_lora: 1 is uniform, less is skewed")
    parser.add_argument("--cv", type=float, default=1.0, help="burstiness of s_lora: 1 is Poisson")
    arguments = parser.parse_args(argv)
    sizes = Sizes(STANDARD, AdapterShape(16), 64, 64, NUM_STREAMS)
    if arguments.quick:
        sizes = Sizes(TINY, AdapterShape(4), 8, 6, 8)
        vars(arguments).update(rate=20.0, duration=0.5, adapters=3, rounds=2)
    if arguments.url and "direct" in arguments.only:
        arguments.only = [part for part in arguments.only if part != "direct"]  # it needs an engine of its own
    if arguments.url and not arguments.adapter:
        parser.error("--url needs --adapter NAME ...: the adapters that the server has")

    report = Report("serving", _facts(arguments, sizes), ("load", "what", "value"))
    series: list[Series] = []
    for part in arguments.only:
        if part == "direct":
            series.append(asyncio.run(compare(arguments, sizes, report)))
        else:
            series.append(open_loop(arguments, sizes, part, report))
    report.deliver(arguments, series)


def open_loop(arguments: argparse.Namespace, sizes: Sizes, part: str, report: Report) -> Series:
    workload = open_workload(arguments, part)
    with ExitStack() as stack:
        url, names = arguments.url, arguments.adapter
        if url is None:
            server, names = stack.enter_context(_started(arguments, sizes, workload)), _names(workload)
            url = server.url
        made = bodies(workload, names, sizes.shape.vocab)
        asyncio.run(warm_up(url, names))
        progress(f"{part}: {len(made)} requests in {workload.arrivals[-1].arrival_s:.0f} s")
        load = asyncio.run(send(url, workload, made))
    progress("")
    return _describe(part, load, report)


def open_workload(arguments: argparse.Namespace, part: str) -> Workload:
    number = int(arguments.rate * arguments.duration)
    if part == "s_lora":
        lengths = (8, 24) if arguments.quick else (8, 512)
        return s_lora(
            num_adapters=arguments.adapters,
            alpha=arguments.alpha,
            rate=arguments.rate,
            cv=arguments.cv,
            duration_s=arguments.duration,
            input_range=lengths,
            output_range=lengths,
            ranks=(64, 32, 16, 8),
        )
    if arguments.quick:
        return mixed(num_requests=number, rate=arguments.rate, num_adapters=5, neighbour_tokens=300)
    return mixed(num_requests=number, rate=arguments.rate)


async def warm_up(url: str, names: Sequence[str]) -> None:
    """Each adapter once, so that nobody waits for a first load that a server in use would have behind it."""
    arrivals = tuple(Arrival(0.0, index, 4, 2) for index in range(len(names)))
    workload = Workload("warm up", (AdapterShape(1),) * len(names), arrivals, seed=10_000)
    load = await send(url, workload, bodies(workload, names, 100))
    failed = [one.error for one in load.streams if one.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(names)} adapters do not answer: {failed[0]}")


async def compare(arguments: argparse.Namespace, sizes: Sizes, report: Report) -> Series:
    """Pairs of rounds, the order swapped every time; each pair has prompts of its own."""
    rates: dict[str, list[float]] = {"HTTP": [], "engine": []}
    with _started(arguments, sizes, sizes.streams(0)) as server:
        client = await EngineClient.start(_engine_config(arguments, sizes))
        try:
            held = tickets(sizes.shape, sizes.streams(0).adapters, client.description, arguments.cache)
            for number in range(-1, arguments.rounds):  # the first pair warms up and does not count
                progress(f"direct: pair {number + 1}/{arguments.rounds}")
                pair = await _pair(sizes.streams(number + 1), server.url, client, held, swapped=bool(number % 2))
                if number >= 0:
                    rates["HTTP"].append(pair.by_http)
                    rates["engine"].append(pair.by_engine)
        finally:
            await client.close()
    progress("")
    for way, values in rates.items():
        report.add((f"{sizes.num_streams} streams, {way}", "output tok/s [quartiles]", spread(values)))
    ratio = ratio_of_pairs(rates["HTTP"], rates["engine"])
    report.findings.append(f"{sizes.num_streams} streams, HTTP / engine: {ratio}, wanted {GOAL}")
    report.raw["direct"] = rates
    spreads = [spread(values) for values in rates.values()]
    lows, highs = [one.low for one in spreads], [one.high for one in spreads]
    return Series("output tokens/s", list(rates), [one.median for one in spreads], lows, highs)


async def _pair(
    workload: Workload, url: str, client: EngineClient, held: Sequence[AdapterTicket], *, swapped: bool
) -> Pair:
    vocab_size = client.description.vocab_size
    made, requests = bodies(workload, _names(workload), vocab_size), requests_of(workload, held, vocab_size)
    if swapped:
        by_engine = await _by_engine(client, requests)
        return Pair(await _by_http(url, workload, made), by_engine)
    return Pair(await _by_http(url, workload, made), await _by_engine(client, requests))


async def _by_http(url: str, workload: Workload, made: Sequence[bytes]) -> float:
    load = await send(url, workload, made)
    failed = [one.error for one in load.streams if one.error]
    if failed:
        raise RuntimeError(f"{len(failed)} streams failed: {failed[0]}")
    return load.tokens_per_s


async def _by_engine(client: EngineClient, requests: Sequence[EngineRequest]) -> float:
    async def consume(request: EngineRequest) -> int:
        return sum([len(delta.token_ids) async for delta in client.submit(request)])

    start_s = time.perf_counter()
    counts = await asyncio.gather(*(consume(request) for request in requests))
    return sum(counts) / (time.perf_counter() - start_s)


def _started(arguments: argparse.Namespace, sizes: Sizes, workload: Workload) -> ServerProcess:
    """A server with the workload's adapters registered under their names."""
    progress(f"starting a server with {len(workload.adapters)} adapters")
    folder = arguments.cache / "served" / f"{sizes.shape.name}-{workload.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, (name, adapter) in enumerate(zip(_names(workload), workload.adapters, strict=True)):
        (folder / name).symlink_to(adapter_directory(sizes.shape, adapter, number, arguments.cache).resolve())
    model = base_directory(sizes.shape, arguments.cache)
    return ServerProcess(model, ["--adapters-dir", str(folder), *_server_flags(arguments)])


def _server_flags(arguments: argparse.Namespace) -> list[str]:
    given = ["--dtype", arguments.dtype, "--device", arguments.device, "--log-level", "warning"]
    given += ["--max-queued-requests", "4096"]
    return [*given, "--num-threads", str(arguments.threads)] if arguments.threads else given


def _engine_config(arguments: argparse.Namespace, sizes: Sizes) -> EngineConfig:
    return EngineConfig(
        model=str(base_directory(sizes.shape, arguments.cache)),
        dtype=arguments.dtype,
        device=arguments.device,
        num_threads=arguments.threads,
    )


def _names(workload: Workload) -> list[str]:
    return [f"bench-{number}" for number in range(len(workload.adapters))]


def _describe(part: str, load: Load, report: Report) -> Series:
    ended = load.ended
    first = [one.first_token_s * 1e3 for one in ended]
    gaps = [gap * 1e3 for one in ended for gap in one.gaps_s]
    attained = sum(one < ATTAINED_S * 1e3 for one in first) / len(load.streams)
    name = f"{part}, {len(load.streams)} requests"
    for what, values in (("first token ms", first), ("gap between tokens ms", gaps)):
        for share, value in zip((50, 90, 99), percentiles(values), strict=True):
            report.add((name, f"{what}, p{share}", value))
    report.add((name, "output tok/s", load.tokens_per_s))
    report.add((name, "requests/s", len(ended) / load.total_s))
    report.add((name, f"first token within {ATTAINED_S:.0f} s", f"{attained:.1%}"))
    report.add((name, "failed", len(load.streams) - len(ended)))
    errors = sorted({one.error for one in load.streams if one.error})
    report.findings += [f"{part}: {error}" for error in errors[:3]]
    report.raw[part] = {
        "first_token_s": [one.first_token_s for one in ended],
        "token_times_s": [one.token_times_s for one in ended],
        "total_s": load.total_s,
        "errors": errors,
    }
    points = list(range(1, 100))
    return Series(f"{part}: first token, ms", x=points, lines={part: percentiles(first, points)}, x_title="percentile")


def _facts(arguments: argparse.Namespace, sizes: Sizes) -> dict[str, object]:
    return conditions(
        dtype=arguments.dtype,
        server=arguments.url or f"started here, {sizes.shape.name}",
        open_loop=f"{arguments.rate} requests/s for {arguments.duration} s",
        s_lora=f"{arguments.adapters} adapters, alpha {arguments.alpha}, cv {arguments.cv}, ranks 64 32 16 8",
        direct=f"{sizes.num_streams} of {sizes.num_prompt} + {sizes.num_new} tokens, {NUM_ADAPTERS} adapters",
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    main()
