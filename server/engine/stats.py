"""The engine in numbers, as one immutable snapshot: gauges of now and totals since the start."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    total_steps_shed: int = 0  # steps that ran out of memory and were retried smaller
    total_steps_failed: int = 0
    total_finished: dict[str, int] = field(default_factory=dict)  # by finish reason

    @property
    def kv_usage(self) -> float:
        """Share of the pool that cannot be had by a new sequence: 0..1."""
        if not self.num_units:
            return 0.0
        return (self.units_kv + self.units_adapters_pinned) / self.num_units
