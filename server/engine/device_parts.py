"""What is built on one device: the base with adapters attached, its pool, and the runner that steps it.

No scheduler and no books: who decides is built beside it (`server.engine.assembly`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from peft_core.attach import attach
from peft_core.kernels.reference import ReferenceKernels
from peft_core.kernels.rowwise import RowwiseKernels
from peft_core.kernels.staging import Staging
from peft_core.layers import ActiveBatch, AdapterKernels
from peft_core.residency import Residency
from peft_core.sites import site_groups, up_tile
from server.engine.base_model import BaseModel, load_base_model
from server.engine.batch_builder import BatchBuilder
from server.engine.config import EngineConfig
from server.engine.errors import EngineStartError
from server.engine.kv_cache import KVCache
from server.engine.model_runner import ModelRunner
from server.engine.paged_attention import NAME as PAGED_ATTENTION
from server.engine.sampler import Sampler
from server.engine.self_check import plain_logits, self_check
from server.limits import cpu_limit, memory_limit_bytes

Progress = Callable[[str, float], None]

POOL_SHARE = 0.5  # of the memory that the weights leave, on CPU
CUDA_POOL_SHARE = 0.9
ADAPTER_ROOM_BYTES = 4 << 30  # beyond the K/V of all sequences at full length, more room is of no use
MIN_UNITS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceParts:
    """Everything that lives on the device, checked and ready to step."""

    base: BaseModel
    cache: KVCache
    residency: Residency
    runner: ModelRunner
    vocab_size: int  # columns of the base's logits

    @property
    def device(self) -> torch.device:
        return self.cache.pool.device


def build_device(config: EngineConfig, progress: Progress) -> DeviceParts:
    """Load, attach, check. `progress(stage, fraction)` is called as things go on.

    Raises:
        EngineStartError: the model cannot be served, or there is no room for it.
    """
    torch.set_num_threads(config.num_threads or cpu_limit())
    base = load_base_model(config, progress)
    plain = plain_logits(base.model, base.spec.vocab_size)
    device = base.model.device
    progress("allocate pool", 0.0)
    cache = KVCache(base.kv_shape, _num_units(config, base, device), device)
    adapter_dtype = dtype_name(base.model.dtype) if config.adapter_dtype == "auto" else config.adapter_dtype
    residency = Residency(cache.pool, site_groups(base.spec), up_tile(base.spec), adapter_dtype)
    active = ActiveBatch(_kernels(residency, device))
    progress("attach", 0.0)
    attach(base.model, base.spec, active)
    base.model.set_attn_implementation(PAGED_ATTENTION)
    vocab_size = plain.logits[0].shape[-1]
    sampler = Sampler(config.max_num_seqs, vocab_size, base.max_model_len, device, base.eos_token_ids)
    max_rows = config.max_num_batched_tokens  # of a step: a shrunken budget may be exceeded by a chunk, this never
    staging = Staging(BatchBuilder.num_bytes(max_rows), device)
    runner = ModelRunner(base.model, cache, active, sampler, staging, max_rows, residency.prefix)
    progress("self-check", 0.0)
    _log.info("self-check: largest difference %.1e of the largest logit", self_check(runner, plain, config.block_size))
    return DeviceParts(base, cache, residency, runner, vocab_size)


def _kernels(residency: Residency, device: torch.device) -> AdapterKernels:
    return RowwiseKernels(residency) if device.type == "cpu" else ReferenceKernels(residency)


def _num_units(config: EngineConfig, base: BaseModel, device: torch.device) -> int:
    unit_bytes = base.kv_shape.unit_bytes
    pool_bytes = config.pool_bytes
    if pool_bytes is None:
        pool_bytes = min(_free_bytes(device), _useful_bytes(config, base))
    num_units = pool_bytes // unit_bytes
    if num_units < MIN_UNITS:
        raise EngineStartError(
            f"the pool for K/V and adapters would be {pool_bytes} bytes, and {MIN_UNITS * unit_bytes} is the least "
            "that is useful. Give --pool-bytes, or a machine with more memory."
        )
    return int(num_units)


def _free_bytes(device: torch.device) -> int:
    """What the weights leave, times the share that the pool may take."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(max(0, free - (1 - CUDA_POOL_SHARE) * total))
    own = psutil.Process().memory_info().rss
    available = min(memory_limit_bytes() - own, psutil.virtual_memory().available)
    return int(max(0, available) * POOL_SHARE)


def _useful_bytes(config: EngineConfig, base: BaseModel) -> int:
    blocks_each = -(-base.max_model_len // config.block_size)
    return config.max_num_seqs * blocks_each * base.kv_shape.unit_bytes + ADAPTER_ROOM_BYTES


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
