"""What the loaded model and the allocated pool permit: decided once, after the configuration met the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLimits:
    max_model_len: int  # tokens of prompt and answer together
    vocab_size: int  # ids >= this do not exist
    eos_token_ids: tuple[int, ...]
    num_units: int  # size of the pool
    unit_bytes: int  # one K/V block of `EngineConfig.block_size` tokens, all layers
