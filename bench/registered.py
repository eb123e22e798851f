"""Registered adapters cost nothing: the same load on servers that know few adapters and many.

    1 in use    a server that knows only this one            against one that knows 1,000
    8 in use    a server that knows only these eight         against the same

All contents differ. Each pair is measured on two servers that were started for it, so that whatever makes one process
faster than another for as long as it lives is drawn again every time, and is not taken for a difference. The order of
starting and of measuring is swapped from pair to pair; both get the same prompts, of which each pair has its own. The
interval of the ratio should include 1.00 and exclude 0.95.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import ExitStack

from bench.conditions import conditions
from bench.http_load import bodies, send
from bench.models import STANDARD, TINY, BaseShape, adapter_directory, base_directory
from bench.report import Report, Series, flags, progress
from bench.server_process import ServerProcess
from bench.statistics import ratio_of_pairs, spread
from bench.workloads import AdapterShape, Arrival, Workload

SMALL = AdapterShape(4, ("q_proj", "v_proj"))  # 0.3 MB each on the standard base: 1,000 of them fit anywhere
WORST = 0.95
_WARM_UP = 1  # rounds of a new server that do not count: they load adapters and grow buffers
_COUNTED = 2  # rounds after them, of which the faster one counts: other work on the machine can only slow one down


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=10)
    parser.add_argument("--registered", type=int, default=1000, help="adapters of the server that knows many")
    parser.add_argument("--in-use", type=int, nargs="+", default=(1, 8), help="adapters in use, one comparison each")
    parser.add_argument("--streams", type=int, default=16, help="concurrent requests of a round")
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(registered=6, in_use=(1, 2), streams=4, output_tokens=4, rounds=2)
    shape = TINY if arguments.quick else STANDARD

    rates: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        for in_use in arguments.in_use:
            order = [in_use, arguments.registered]
            measure_pair(arguments, shape, in_use, number, order if number % 2 else order[::-1], rates)
    progress("")
    deliver(arguments, shape, rates)


def measure_pair(
    arguments: argparse.Namespace,
    shape: BaseShape,
    in_use: int,
    number: int,
    order: list[int],
    rates: dict[str, list[float]],
) -> None:
    """Start two servers, measure them in turn, and add output tokens a second under "in use/registered"."""
    with ExitStack() as stack:
        urls = {known: stack.enter_context(started(arguments, shape, known)).url for known in order}
        best = dict.fromkeys(order, 0.0)
        for round_ in range(_WARM_UP + _COUNTED):
            for known in order if round_ % 2 else reversed(order):
                progress(f"pair {number + 1}/{arguments.rounds}: {in_use} in use, {known} registered")
                rate = asyncio.run(measured(arguments, shape, in_use, 10 * number + round_, urls[known]))
                best[known] = max(best[known], rate if round_ >= _WARM_UP else 0.0)
    for known, rate in best.items():
        rates.setdefault(f"{in_use}/{known}", []).append(rate)


def started(arguments: argparse.Namespace, shape: BaseShape, number: int) -> ServerProcess:
    """A server on which the first `number` adapters are registered; its store is kept from one start to the next."""
    progress(f"starting a server with {number} adapters")
    folder = arguments.cache / "registered" / f"{shape.name}-{number}"
    if not folder.exists():
        folder.mkdir(parents=True)
        for index in range(number):
            (folder / name_of(index)).symlink_to(adapter_directory(shape, SMALL, index, arguments.cache).resolve())
    given = ["--adapters-dir", str(folder), "--dtype", arguments.dtype, "--log-level", "warning", "--pool-bytes", "1G"]
    if arguments.threads:
        given += ["--num-threads", str(arguments.threads)]
    store = folder.with_name(f"{folder.name}-store")
    return ServerProcess(base_directory(shape, arguments.cache), given, store=store)


async def measured(arguments: argparse.Namespace, shape: BaseShape, in_use: int, seed: int, url: str) -> float:
    """Output tokens a second of one round."""
    workload = streams(arguments, in_use, seed)
    made = bodies(workload, [name_of(index) for index in range(in_use)], shape.vocab)
    load = await send(url, workload, made)
    failed = [one.error for one in load.streams if one.error]
    if failed:
        raise RuntimeError(f"{len(failed)} streams failed: {failed[0]}")
    return load.tokens_per_s


def streams(arguments: argparse.Namespace, in_use: int, seed: int) -> Workload:
    arrivals = tuple(Arrival(0.0, index % in_use, 64, arguments.output_tokens) for index in range(arguments.streams))
    return Workload("registered", (SMALL,) * in_use, arrivals, seed)


def name_of(index: int) -> str:
    return f"registered-{index}"


def deliver(arguments: argparse.Namespace, shape: BaseShape, rates: dict[str, list[float]]) -> None:
    facts = conditions(
        dtype=arguments.dtype,
        base=shape.name,
        adapters=f"rank {SMALL.rank} on {' '.join(SMALL.targets)}, all contents different",
        requests=f"{arguments.streams} of 64 + {arguments.output_tokens} tokens, at once, over HTTP",
        pairs=f"{arguments.rounds}, each on two servers started for it",
    )
    report = Report("registered", facts, ("in use", "registered", "output tok/s [quartiles]"))
    for name, values in rates.items():
        report.add((*name.split("/"), spread(values)))
    for in_use in arguments.in_use:
        ratio = ratio_of_pairs(rates[f"{in_use}/{arguments.registered}"], rates[f"{in_use}/{in_use}"])
        holds = "holds" if WORST < ratio.low <= 1.0 <= ratio.high else "does not hold"
        report.findings.append(
            f"{in_use} in use, {arguments.registered} registered / {in_use} registered: {ratio}; "
            f"wanted an interval with 1.00 and without {WORST}: {holds}"
        )
    report.raw = {"tokens_per_s": rates}
    spreads = [spread(values) for values in rates.values()]
    labels = [f"{name.split('/')[0]} in use, {name.split('/')[1]} registered" for name in rates]
    lows, highs = [one.low for one in spreads], [one.high for one in spreads]
    report.deliver(arguments, [Series("output tokens/s", labels, [one.median for one in spreads], lows, highs)])


if __name__ == "__main__":
    main()
