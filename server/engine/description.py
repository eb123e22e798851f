"""What a ready engine says about itself, once: plain data for the front, the library and `/info`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineDescription:
    spec: Mapping[str, Any]  # the base model's `BaseModelSpec` as JSON: its sites and its fingerprint
    max_model_len: int  # tokens of prompt and answer together
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_units: int  # size of the pool
    unit_bytes: int  # one K/V block of `block_size` tokens, all layers
    block_size: int  # tokens
    max_num_seqs: int
    dtype: str  # "float32" | "bfloat16" | "float16", resolved
    device: str  # "cpu" | "cuda", resolved
    adapter_dtype: str  # resolved: the dtype that adapter images must be packed in
    base_directory: str = ""  # where the base's files lie on this machine; some kinds of adapters need its weights
