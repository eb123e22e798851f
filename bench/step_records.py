"""Looking into the engine's steps without changing it: what each step had to do, and how long its parts took.

A watch replaces methods of the engine's classes by timed ones for as long as it is open; the engine's own code stays
as it is. Only one may be open at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner
from server.engine.sampler import Sampler
from server.engine.sequence import SequenceTable
from server.engine.step import StepPlan


class StepWork(NamedTuple):
    """What a step had to compute."""

    decode_rows: int
    decode_context: int  # tokens that the decoding rows attended to, summed
    prefill_tokens: int
    prefill_context: int  # the same sum for the tokens of prompts

    @classmethod
    def of(cls, plan: StepPlan) -> StepWork:
        counts, starts = plan.counts.astype(np.int64), plan.starts.astype(np.int64)
        contexts = counts * starts + counts * (counts + 1) // 2
        is_decode = counts == 1
        return cls(
            int(is_decode.sum()),
            int(contexts[is_decode].sum()),
            int(counts[~is_decode].sum()),
            int(contexts[~is_decode].sum()),
        )


class StepParts(NamedTuple):
    """Seconds of one step of the engine."""

    work: StepWork
    step_s: float  # all of it
    forward_s: float  # the model
    sample_s: float  # choosing tokens

    @property
    def host_s(self) -> float:
        """Schedule, build and post-process: everything but the model and the choice of tokens."""
        return self.step_s - self.forward_s - self.sample_s


@dataclass
class _Clock:
    records: list[StepParts] = field(default_factory=list)
    work: StepWork | None = None
    forward_s: float = 0.0
    sample_s: float = 0.0

    def reset(self) -> None:
        self.work, self.forward_s, self.sample_s = None, 0.0, 0.0


@contextmanager
def watching() -> Iterator[list[StepParts]]:
    """The records of every step that computes something while the watch is open."""
    clock = _Clock()
    originals = {
        (ModelRunner, "execute"): ModelRunner.execute,
        (ModelRunner, "forward"): ModelRunner.forward,
        (Sampler, "sample"): Sampler.sample,
        (Engine, "step"): Engine.step,
    }
    replacements = {
        "execute": _noting_work(clock, ModelRunner.execute),
        "forward": _timed(clock, "forward_s", ModelRunner.forward),
        "sample": _timed(clock, "sample_s", Sampler.sample),
        "step": _whole(clock, Engine.step),
    }
    for owner, name in originals:
        setattr(owner, name, replacements[name])
    try:
        yield clock.records
    finally:
        for (owner, name), method in originals.items():
            setattr(owner, name, method)


def _noting_work(clock: _Clock, method: Callable[..., Any]) -> Callable[..., Any]:
    def execute(runner: ModelRunner, plan: StepPlan, table: SequenceTable) -> Any:
        clock.work = StepWork.of(plan)
        return method(runner, plan, table)

    return execute


def _timed(clock: _Clock, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start_s = time.perf_counter()
        result = method(*arguments)
        setattr(clock, part, getattr(clock, part) + time.perf_counter() - start_s)
        return result

    return timed


def _whole(clock: _Clock, method: Callable[..., Any]) -> Callable[..., Any]:
    def step(engine: Engine) -> Any:
        clock.reset()
        start_s = time.perf_counter()
        result = method(engine)
        if clock.work is not None:
            elapsed_s = time.perf_counter() - start_s
            clock.records.append(StepParts(clock.work, elapsed_s, clock.forward_s, clock.sample_s))
        return result

    return step
