"""Loading is not felt: running streams beside a storm of cold loads, and what a cold request waits for.

Streams run on adapters that are on the device; their inter-token times are compared between three phases, which
take turns in one run on one engine:

    calm      the streams alone
    resident  and short requests at a steady rate, on the streams' own adapters
    cold      and the same requests, each on an adapter that is on disk only, its file dropped from the page cache

cold / calm is what the streams' users feel. cold / resident is what loading alone costs: serving more requests at all
is in both. A cold request's wait is split into the phases of its load, as the engine tells them, and the steps after;
there is no phase for decoding, since an image was checked and packed when its adapter was committed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.conditions import conditions
from bench.models import STANDARD, TINY, base_directory, tickets
from bench.report import Report, Series, flags, progress
from bench.statistics import figure, percentiles
from bench.workloads import AdapterShape
from server.engine.client import EngineClient
from server.engine.config import EngineConfig
from server.engine.request import AdapterTicket, EngineRequest, FinishReason, SamplingParams, Tier

PHASES = ("calm", "resident", "cold")
P50_GOAL, P99_GOAL, WAIT_GOAL_S = 1.15, 1.5, 1.0
_LOAD_PHASES = ("queue", "read", "check", "copy", "bind")


@dataclass
class Measured:
    """Everything of one kind of phase, over all rounds."""

    gaps_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)  # of the short requests, from arrival to first token
    phases_s: list[dict[str, float]] = field(default_factory=list)  # of cold requests, parallel to waits_s


@dataclass
class Bench:
    client: EngineClient
    warm: list[AdapterTicket]
    cold: list[AdapterTicket]
    arguments: argparse.Namespace
    vocab_size: int
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def request(self, adapter: AdapterTicket, num_prompt: int, num_output: int) -> EngineRequest:
        number = next(self.numbers)
        prompt = tuple(2 + (number * 131 + place * 17) % (self.vocab_size - 2) for place in range(num_prompt))
        params = SamplingParams(max_new_tokens=num_output, ignore_eos=True)
        return EngineRequest(f"r{number}", prompt, params, adapter)


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=3)
    parser.add_argument("--streams", type=int, default=8, help="running streams, on 4 adapters")
    parser.add_argument("--loads-per-s", type=float, default=5.0, help="short requests a second, each a cold load")
    parser.add_argument("--rank", type=int, default=24, help="of the cold adapters; 24 on all linears are 10.9 MB")
    parser.add_argument("--cold-adapters", type=int, default=32, help="that take turns")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one phase, from when all streams run")
    parser.add_argument("--host-adapter-memory", type=int, default=0, help="bytes of the host tier; 0: straight in")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(streams=2, rank=4, cold_adapters=3, seconds=1.6, rounds=1)
    measured = asyncio.run(measure(arguments))
    progress("")
    deliver(arguments, measured)


async def measure(arguments: argparse.Namespace) -> dict[str, Measured]:
    shape = TINY if arguments.quick else STANDARD
    progress("starting the engine")
    config = EngineConfig(
        model=str(base_directory(shape, arguments.cache)),
        dtype="float32",
        pool_bytes=(64 if arguments.quick else 1024) << 20,
        num_threads=arguments.threads,
        enable_prefix_caching=False,
        host_adapter_bytes=arguments.host_adapter_memory,
    )
    client = await EngineClient.start(config)
    try:
        num_warm = min(4, arguments.streams)
        shapes = (AdapterShape(16),) * num_warm + (AdapterShape(arguments.rank),) * arguments.cold_adapters
        held = tickets(shape, shapes, client.description, arguments.cache)
        bench = Bench(client, held[:num_warm], held[num_warm:], arguments, client.description.vocab_size)
        for ticket in bench.warm:
            await client.load(ticket)
        found = {phase: Measured() for phase in PHASES}
        for number in range(arguments.rounds):
            turn = number % len(PHASES)
            for phase in PHASES[turn:] + PHASES[:turn]:
                progress(f"round {number + 1}/{arguments.rounds}: {phase}")
                await run_phase(bench, phase, found[phase])
        return found
    finally:
        await client.close()


@dataclass
class Window:
    """The part of a phase that counts: from when every stream has its first token."""

    num_awaited: int
    seconds: float
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    start_s: float = math.inf

    def first_token(self) -> None:
        self.num_awaited -= 1
        if self.num_awaited == 0:
            self.start_s = time.perf_counter()
            self.begun.set()

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds


async def run_phase(bench: Bench, phase: str, measured: Measured) -> None:
    """Streams for as long as the phase lasts, and the short requests beside them."""
    num_streams = bench.arguments.streams
    window = Window(num_streams, bench.arguments.seconds)
    jobs = [stream(bench, bench.warm[index % len(bench.warm)], window, measured) for index in range(num_streams)]
    if phase != "calm":
        jobs.append(storm(bench, bench.cold if phase == "cold" else bench.warm, window, measured, phase == "cold"))
    await asyncio.gather(*jobs)


async def stream(bench: Bench, adapter: AdapterTicket, window: Window, measured: Measured) -> None:
    room = bench.client.description.max_model_len - 64
    last_s: float | None = None
    async for delta in bench.client.submit(bench.request(adapter, 64, room)):
        now_s = time.perf_counter()
        if delta.finish is not None:
            raise RuntimeError(f"a stream ended in the middle of a phase: {delta.error or delta.finish}")
        if now_s >= window.end_s:
            return
        if last_s is None:
            window.first_token()
        elif last_s >= window.start_s:
            measured.gaps_s.append(now_s - last_s)
        last_s = now_s


async def storm(bench: Bench, adapters: list[AdapterTicket], window: Window, measured: Measured, is_cold: bool) -> None:
    await window.begun.wait()
    asked: list[asyncio.Task[None]] = []
    free: asyncio.Queue[AdapterTicket] = asyncio.Queue()  # those that no request is on: they are cold
    for ticket in adapters:
        free.put_nowait(ticket)
    for number in range(int(window.seconds * bench.arguments.loads_per_s)):
        due_s = window.start_s + number / bench.arguments.loads_per_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        ticket = await free.get() if is_cold else adapters[number % len(adapters)]
        asked.append(asyncio.create_task(short_request(bench, ticket, due_s, measured, free if is_cold else None)))
    await asyncio.gather(*asked)


async def short_request(
    bench: Bench, ticket: AdapterTicket, due_s: float, measured: Measured, free: asyncio.Queue[AdapterTicket] | None
) -> None:
    """`free`: the adapter is cold, and goes back there as cold as it was."""
    if free is not None:
        drop_from_page_cache(ticket)
    first_s = 0.0
    async for delta in bench.client.submit(bench.request(ticket, 16, 4)):
        if delta.finish is FinishReason.FAILED:
            raise RuntimeError(f"a short request failed: {delta.error}")
        first_s = first_s or time.perf_counter()
    measured.waits_s.append(first_s - due_s)
    if free is not None:
        (line,) = [one for one in await bench.client.residency() if one.key == ticket.key]
        measured.phases_s.append(dict(line.load_s))
        await bench.client.evict(ticket.key)
        await bench.client.evict(ticket.key, Tier.HOST)
        free.put_nowait(ticket)


def drop_from_page_cache(ticket: AdapterTicket) -> None:
    """The next read of the image comes from the disk."""
    descriptor = os.open(ticket.image_path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def deliver(arguments: argparse.Namespace, measured: dict[str, Measured]) -> None:
    shape = TINY if arguments.quick else STANDARD
    size = shape.adapter_parameters(AdapterShape(arguments.rank)) * 4 / 1e6
    facts = conditions(
        streams=f"{arguments.streams}, on {min(4, arguments.streams)} adapters of rank 16",
        storm=f"{arguments.loads_per_s:g}/s, 16 + 4 tokens each, cold adapters of {size:.1f} MB",
        phases=f"{arguments.rounds} of each, {arguments.seconds:g} s, in turn",
        host_tier=f"{arguments.host_adapter_memory} bytes",
    )
    report = Report(
        "cold_start", facts, ("phase", "gaps", "p50 ms", "p99 ms", "requests", "wait p50 ms", "wait max ms")
    )
    points: dict[str, list[float]] = {}
    for phase, found in measured.items():
        points[phase] = [gap * 1e3 for gap in percentiles(found.gaps_s, (50, 99))]
        waits = [wait * 1e3 for wait in found.waits_s]
        wait_50, wait_max = percentiles(waits, (50, 100))
        report.add((phase, len(found.gaps_s), *points[phase], len(waits), wait_50, wait_max))
    for other in ("calm", "resident"):
        p50, p99 = (a / b for a, b in zip(points["cold"], points[other], strict=True))
        wanted = f" (wanted {P50_GOAL} and {P99_GOAL} at most)" if other == "calm" else ""
        report.findings.append(f"cold / {other}: p50 {figure(p50)}, p99 {figure(p99)}{wanted}")
    cold = measured["cold"]
    means = _mean_phases_ms(cold)
    report.findings.append("a cold request's wait, mean ms: " + ", ".join(f"{k} {figure(v)}" for k, v in means.items()))
    report.findings.append(f"slowest cold request: {figure(max(cold.waits_s))} s, wanted {WAIT_GOAL_S} s at most")
    report.raw = {
        phase: {"gaps_s": found.gaps_s, "waits_s": found.waits_s, "phases_s": found.phases_s}
        for phase, found in measured.items()
    }
    series = [
        Series("inter-token time, p50 and p99, ms", [f"{one} p{p}" for one in PHASES for p in (50, 99)],
               [value for one in PHASES for value in points[one]]),
        Series("a cold request's wait, mean ms", list(means), list(means.values())),
    ]  # fmt: skip
    report.deliver(arguments, series)


def _mean_phases_ms(cold: Measured) -> dict[str, float]:
    """The phases of the load, and what is left of the wait: steps that ran, and those in which it had its turn."""
    number = len(cold.phases_s)
    means = {phase: sum(one.get(phase, 0.0) for one in cold.phases_s) * 1e3 / number for phase in _LOAD_PHASES}
    means["steps"] = max(0.0, sum(cold.waits_s) * 1e3 / number - sum(means.values()))
    return means


if __name__ == "__main__":
    main()
