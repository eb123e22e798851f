"""The engine in numbers, as one immutable snapshot: gauges of now and totals since the start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from server.engine.sequence import BASE_SLOT, Int32Array
from server.engine.step import StepPlan


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Plain numbers (JSON by `dataclasses.asdict`); names starting with `total_` only ever grow."""

    num_running: int = 0
    num_waiting: int = 0  # accepted and not running, for whatever reason
    num_waiting_for_adapter: int = 0  # of those, passed over in the last step because of their adapter
    num_units: int = 0
    units_free: int = 0
    units_kv: int = 0  # K/V blocks that running sequences use
    units_cached: int = 0  # K/V blocks kept for prefix hits, evictable
    units_adapters_pinned: int = 0  # in use, or being loaded
    units_adapters_idle: int = 0  # evictable
    num_adapters_resident: int = 0
    num_adapters_loading: int = 0
    last_step_sequences: int = 0
    last_step_tokens: int = 0
    last_step_adapters: int = 0  # distinct, the base not counted
    last_step_s: float = 0.0
    total_steps: int = 0
    total_prompt_tokens: int = 0  # computed or found in the cache, once a request
    total_generation_tokens: int = 0
    total_prefix_queries: int = 0  # prompt tokens looked up
    total_prefix_hits: int = 0  # prompt tokens found
    total_preemptions: int = 0
    total_adapter_loads: int = 0
    total_adapter_load_failures: int = 0
    total_adapter_evictions: dict[str, int] = field(default_factory=dict)  # by reason
    total_kv_evictions: int = 0
    total_host_hits: int = 0  # loads that found the image in the host tier
    host_bytes: int = 0  # held by the host tier now
    total_adapter_load_s: dict[str, float] = field(default_factory=dict)  # by phase: queue, read, check, copy, bind
    total_steps_shed: int = 0  # steps that ran out of memory and were retried smaller
    total_steps_failed: int = 0
    total_finished: dict[str, int] = field(default_factory=dict)  # by finish reason

    @property
    def kv_usage(self) -> float:
        """Share of the pool that cannot be had by a new sequence: 0..1."""
        if not self.num_units:
            return 0.0
        return (self.units_kv + self.units_adapters_pinned) / self.num_units


@dataclass(slots=True)
class StepTotals:
    """What the engine itself counts, step by step; the rest is counted by pool, scheduler and adapters."""

    total_steps: int = 0
    total_generation_tokens: int = 0
    total_steps_shed: int = 0
    total_steps_failed: int = 0
    last_step_s: float = 0.0
    finished: Counter[str] = field(default_factory=Counter)
    _last_tokens: int = 0
    _last_slots: Int32Array | None = None  # [sequences of the last step]

    def count_step(self, plan: StepPlan, slots: Int32Array) -> None:
        self.total_steps += 1
        self._last_tokens = plan.num_tokens
        self._last_slots = slots

    def snapshot(self) -> EngineStats:
        slots = np.empty(0, np.int32) if self._last_slots is None else self._last_slots
        return EngineStats(
            last_step_sequences=len(slots),
            last_step_tokens=self._last_tokens,
            last_step_adapters=len(np.unique(slots[slots != BASE_SLOT])),
            last_step_s=self.last_step_s,
            total_steps=self.total_steps,
            total_generation_tokens=self.total_generation_tokens,
            total_steps_shed=self.total_steps_shed,
            total_steps_failed=self.total_steps_failed,
            total_finished=dict(self.finished),
        )
