"""Where a step's time goes: torch's profiler over decode steps and one prefill step, operators sorted into parts.

Base alone and with one distinct adapter a row, on the standard shape. The profiler itself costs a little per operator,
so shares are to be read, not milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile

from bench.conditions import conditions
from bench.drive import requests_of, start_engine, warm_up
from bench.models import STANDARD, TINY, tickets
from bench.report import Report, Series, flags, progress
from bench.workloads import ALL_LINEAR, BASE, AdapterShape, Arrival, Workload
from server.engine.engine import Engine
from server.engine.request import EngineRequest

# Operators that name their part; everything else that computes is elementwise or copies.
PARTS = {
    "base linears": ("_linear_pointwise", "aten::linear"),
    "adapter products": ("embedding_bag", "aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "gathers (K/V, hidden)": ("index_select", "index_copy", "index_fill"),
}
ELEMENTWISE = "elementwise and copies"
HOST = "host (interpreter, dispatch)"
NUM_DECODE_STEPS = 8
NUM_FIRST_STEPS = 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    arguments = parser.parse_args(argv)
    shape = TINY if arguments.quick else STANDARD
    engine, description = start_engine(shape, arguments.cache, dtype=arguments.dtype, num_threads=arguments.threads)
    adapters = (AdapterShape(16, ALL_LINEAR),) * arguments.requests
    held = tickets(shape, adapters, description, arguments.cache)
    warm_up(engine, held)
    facts = conditions(
        dtype=arguments.dtype, requests=arguments.requests, prompt_tokens=arguments.prompt_tokens, base=shape.name
    )
    phases = [f"{phase}, {who}" for who in ("base", "adapters") for phase in ("prefill", "decode")]
    measured: dict[str, dict[str, float]] = {}
    for who in ("base", "adapters"):
        arrivals = tuple(
            Arrival(0.0, BASE if who == "base" else index, arguments.prompt_tokens, NUM_DECODE_STEPS + 8)
            for index in range(arguments.requests)
        )
        workload = Workload("profile", adapters, arrivals, seed=0)
        progress(f"profiling {who}")
        requests = requests_of(workload, held, description.vocab_size)
        measured[f"prefill, {who}"], measured[f"decode, {who}"] = profile_requests(engine, requests)
    progress("")
    report = Report("step_profile", facts, ("part", *(f"{phase} ms" for phase in phases)))
    for part in [*PARTS, ELEMENTWISE, HOST]:
        report.add((part, *(measured[phase][part] for phase in phases)))
    report.add(("whole step", *(sum(measured[phase].values()) for phase in phases)))
    report.raw = {"milliseconds": measured}
    series = [Series(f"{phase}, ms", list(parts), list(parts.values())) for phase, parts in measured.items()]
    report.deliver(arguments, series)


def profile_requests(engine: Engine, requests: Sequence[EngineRequest]) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds by part, of the first step (all prompts) and of a decode step."""
    for request in requests:
        engine.submit(request)
    prefill = profile_steps(engine, 1)
    for _ in range(NUM_FIRST_STEPS):
        engine.step()
    decode = profile_steps(engine, NUM_DECODE_STEPS)
    while engine.has_work:
        engine.step()
    return prefill, decode


def profile_steps(engine: Engine, num_steps: int) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(num_steps):
            engine.step()
    events = recorded.key_averages()
    spent = dict.fromkeys([*PARTS, ELEMENTWISE], 0.0)
    for event in events:
        spent[part_of(event.key)] += event.self_cpu_time_total / 1e3 / num_steps
    first = min(event.time_range.start for event in recorded.events())
    last = max(event.time_range.end for event in recorded.events())
    return {**spent, HOST: max(0.0, (last - first) / 1e3 / num_steps - sum(spent.values()))}


def part_of(operator: str) -> str:
    for part, names in PARTS.items():
        if any(name in operator for name in names):
            return part
    return ELEMENTWISE


if __name__ == "__main__":
    main()
