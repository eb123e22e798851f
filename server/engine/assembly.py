"""Put an engine together: model, pool, adapters, scheduler. The one place that knows all parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import psutil
import torch

from peft_core.attach import attach
from peft_core.kernels.reference import ReferenceKernels
from peft_core.kernels.rowwise import RowwiseKernels
from peft_core.kernels.staging import Staging
from peft_core.layers import ActiveBatch, AdapterKernels
from peft_core.residency import Residency
from peft_core.sites import site_groups, up_tile
from server.engine.adapter_manager import AdapterManager
from server.engine.base_model import BaseModel, load_base_model
from server.engine.batch_builder import BatchBuilder
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.description import EngineDescription
from server.engine.engine import Engine
from server.engine.errors import EngineStartError
from server.engine.host_images import HostImages
from server.engine.image_reader import PoolReader
from server.engine.kv_cache import KVCache
from server.engine.limits import EngineLimits
from server.engine.model_runner import ModelRunner
from server.engine.paged_attention import NAME as PAGED_ATTENTION
from server.engine.policy import EVICTION_POLICIES
from server.engine.sampler import Sampler
from server.engine.self_check import plain_logits, self_check
from server.limits import cpu_limit, memory_limit_bytes

Progress = Callable[[str, float], None]

POOL_SHARE = 0.5  # of the memory that the weights leave, on CPU
CUDA_POOL_SHARE = 0.9
CUDA_HOST_BYTES, HOST_SHARE = 8 << 30, 0.25  # the host tier beside a GPU: no more than either
ADAPTER_ROOM_BYTES = 4 << 30  # beyond the K/V of all sequences at full length, more room is of no use
MIN_UNITS = 16

_log = logging.getLogger(__name__)


def build_engine(config: EngineConfig, progress: Progress) -> tuple[Engine, EngineDescription]:
    """Load, attach, check. `progress(stage, fraction)` is called as things go on.

    Raises:
        EngineStartError: the model cannot be served, or there is no room for it.
    """
    torch.set_num_threads(config.num_threads or cpu_limit())
    base = load_base_model(config, progress)
    plain = plain_logits(base.model, base.spec.vocab_size)
    device = base.model.device
    num_units = _num_units(config, base, device)
    progress("allocate pool", 0.0)
    cache = KVCache(base.kv_shape, num_units, device)
    adapter_dtype = _name(base.model.dtype) if config.adapter_dtype == "auto" else config.adapter_dtype
    groups = site_groups(base.spec)
    residency = Residency(cache.pool, groups, up_tile(base.spec), adapter_dtype)
    active = ActiveBatch(_kernels(residency, device))
    progress("attach", 0.0)
    attach(base.model, base.spec, active)
    base.model.set_attn_implementation(PAGED_ATTENTION)
    vocab_size = plain.logits[0].shape[-1]
    sampler = Sampler(config.max_num_seqs, vocab_size, base.max_model_len, device, base.eos_token_ids)
    max_rows = config.max_num_batched_tokens + config.chunk_size  # one chunk may exceed the budget
    staging = Staging(BatchBuilder.num_bytes(max_rows), device)
    runner = ModelRunner(base.model, cache, active, sampler, staging, max_rows, residency.prefix)
    progress("self-check", 0.0)
    _log.info("self-check: largest difference %.1e of the largest logit", self_check(runner, plain, config.block_size))
    blocks = BlockManager(num_units, enable_prefix_caching=config.enable_prefix_caching)
    unit_bytes = base.kv_shape.unit_bytes
    worth_of = EVICTION_POLICIES[config.adapter_eviction]
    host = HostImages(_host_bytes(config, device), lock_pages=device.type == "cuda", worth_of=worth_of)
    adapters = AdapterManager(
        blocks,
        PoolReader(cache.pool, unit_bytes, host),
        residency,
        unit_bytes=unit_bytes,
        clock=time.monotonic,
        max_bytes=config.adapter_bytes,
        worth_of=worth_of,
    )
    limits = EngineLimits(base.max_model_len, vocab_size, base.eos_token_ids, num_units, unit_bytes)
    engine = Engine(config, limits, runner, adapters, blocks)
    progress("ready", 1.0)
    return engine, _description(config, base, limits, adapter_dtype)


def _host_bytes(config: EngineConfig, device: torch.device) -> int:
    """Room of the host tier. On a CPU the pool is host memory itself, so there it has to be asked for."""
    if config.host_adapter_bytes is not None:
        return config.host_adapter_bytes
    if device.type == "cpu":
        return 0
    return int(min(CUDA_HOST_BYTES, HOST_SHARE * psutil.virtual_memory().available))


def _kernels(residency: Residency, device: torch.device) -> AdapterKernels:
    return RowwiseKernels(residency) if device.type == "cpu" else ReferenceKernels(residency)


def _description(config: EngineConfig, base: BaseModel, limits: EngineLimits, adapter_dtype: str) -> EngineDescription:
    return EngineDescription(
        spec=base.spec.to_json(),
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        eos_token_ids=limits.eos_token_ids,
        num_units=limits.num_units,
        unit_bytes=limits.unit_bytes,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        dtype=_name(base.model.dtype),
        device=base.model.device.type,
        adapter_dtype=adapter_dtype,
        base_directory=str(base.directory.resolve()),
    )


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
