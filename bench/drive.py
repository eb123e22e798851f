"""Driving the engine inside this process: a workload in, times and tokens out.

The clock is real. Open loop sends each request at its time; a request whose time is past is sent before the next
step. `everything at once` is a workload whose arrivals are all at zero.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.models import BaseShape, base_directory
from bench.workloads import BASE, Workload
from server.engine.assembly import build_engine
from server.engine.config import EngineConfig
from server.engine.description import EngineDescription
from server.engine.engine import Engine
from server.engine.request import AdapterTicket, EngineRequest, FinishReason, SamplingParams

_IDLE_S = 0.0005


class StepTime(NamedTuple):
    started_s: float  # since the start of the run
    duration_s: float
    num_tokens: int  # computed


@dataclass
class Run:
    """What was measured while one workload ran."""

    total_s: float = 0.0
    steps: list[StepTime] = field(default_factory=list)
    token_ids: dict[str, list[int]] = field(default_factory=dict)
    token_times_s: dict[str, list[float]] = field(default_factory=dict)  # since the start of the run

    @property
    def num_generated(self) -> int:
        return sum(len(tokens) for tokens in self.token_ids.values())

    @property
    def busy_s(self) -> float:
        return sum(step.duration_s for step in self.steps)

    def step_ms(self, num_tokens: int) -> list[float]:
        """Durations of the steps that computed exactly so many tokens."""
        return [step.duration_s * 1e3 for step in self.steps if step.num_tokens == num_tokens]

    def gaps_s(self) -> list[float]:
        """Times between tokens of one request, over all requests."""
        return [
            later - earlier for times in self.token_times_s.values() for earlier, later in itertools.pairwise(times)
        ]


def start_engine(
    shape: BaseShape,
    cache: Path,
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
    **config: object,
) -> tuple[Engine, EngineDescription]:
    """An engine of this process on the benchmark's base. Prefixes are not cached: rounds repeat the same prompts."""
    settings = {"enable_prefix_caching": False, **config}
    return build_engine(EngineConfig(model=str(base_directory(shape, cache)), **settings), progress)  # type: ignore[arg-type]


def requests_of(workload: Workload, tickets: Sequence[AdapterTicket], vocab_size: int) -> list[EngineRequest]:
    """One request an arrival: greedy, of exact length, its id its index."""
    return [
        EngineRequest(
            str(index),
            tuple(workload.prompt_tokens(index, vocab_size)),
            SamplingParams(max_new_tokens=arrival.num_output_tokens, ignore_eos=True),
            adapter=None if arrival.adapter == BASE else tickets[arrival.adapter],
        )
        for index, arrival in enumerate(workload.arrivals)
    ]


def run(engine: Engine, workload: Workload, requests: Sequence[EngineRequest]) -> Run:
    """Open loop over the workload until every request has ended.

    Raises:
        RuntimeError: a request failed; a benchmark over failures measures nothing.
    """
    result = Run(
        token_ids={request.request_id: [] for request in requests},
        token_times_s={request.request_id: [] for request in requests},
    )
    start_s, sent = time.perf_counter(), 0
    while sent < len(requests) or engine.has_work:
        now_s = time.perf_counter() - start_s
        while sent < len(requests) and workload.arrivals[sent].arrival_s <= now_s:
            engine.submit(requests[sent])
            sent += 1
        if engine.has_work:
            _step(engine, start_s, result)
        else:
            time.sleep(min(_IDLE_S, max(0.0, workload.arrivals[sent].arrival_s - now_s)))
    result.total_s = time.perf_counter() - start_s
    return result


def warm_up(engine: Engine, tickets: Sequence[AdapterTicket]) -> None:
    """Load all adapters and run one short request on each, so that no round pays for first times."""
    for index, ticket in enumerate(tickets):
        engine.submit(EngineRequest(f"warm {index}", (17, 18, 19), SamplingParams(max_new_tokens=2), adapter=ticket))
    while engine.has_work:
        if not engine.step().num_tokens:
            time.sleep(_IDLE_S)


def _step(engine: Engine, start_s: float, result: Run) -> None:
    before_s = time.perf_counter()
    output = engine.step()
    after_s = time.perf_counter()
    if output.num_tokens:
        result.steps.append(StepTime(before_s - start_s, after_s - before_s, output.num_tokens))
    elif not output.special:
        time.sleep(_IDLE_S)
    for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
        result.token_ids[request_id].append(token_id)
        result.token_times_s[request_id].append(after_s - start_s)
    for delta in output.special:
        if delta.finish is FinishReason.FAILED:
            raise RuntimeError(f"request {delta.request_id} failed: {delta.error}")
        result.token_ids[delta.request_id].extend(delta.token_ids)
        result.token_times_s[delta.request_id].extend([after_s - start_s] * len(delta.token_ids))
