"""Everything the engine process is told at its start, and nothing it may decide later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

BLOCK_SIZE_TOKENS = 16
CHUNK_SIZE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's own settings: plain data, so that it crosses the process border as JSON.

    Sizes are in tokens unless the name says bytes; `None` means "decide from the model or from the machine".
    """

    model: str  # directory or hub id
    name: str | None = None  # what the base is called; None: as `model`
    revision: str | None = None
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    device: str = "auto"  # auto | cpu | cuda
    adapter_dtype: str = "auto"  # auto (the base's) | float32 | bfloat16
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    chunk_size: int = CHUNK_SIZE_TOKENS
    block_size: int = BLOCK_SIZE_TOKENS
    pool_bytes: int | None = None
    adapter_bytes: int | None = None  # of the pool; None: whatever K/V leaves
    host_adapter_bytes: int | None = None  # copies of images outside the pool; None: decided by the device
    adapter_eviction: str = "weighed"  # a name of `policy.EVICTION_POLICIES`
    enable_prefix_caching: bool = True
    max_pass_over_steps: int = 64
    num_threads: int | None = None
    watchdog_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.chunk_size:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, smaller than one prefill chunk of "
                f"{self.chunk_size} tokens, so no long prompt could ever be scheduled. Raise it to {self.chunk_size}."
            )
        if self.chunk_size % self.block_size:
            raise ValueError(f"chunk_size {self.chunk_size} must be a multiple of block_size {self.block_size}.")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        return cls(**json.loads(text))
