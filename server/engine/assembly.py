"""Put an engine together: model, pool, adapters, scheduler. The one place that knows all parts."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from server.engine.adapter_manager import AdapterManager
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.description import EngineDescription
from server.engine.device_parts import DeviceParts, build_device, dtype_name
from server.engine.engine import Engine
from server.engine.host_images import HostImages
from server.engine.image_reader import PoolReader
from server.engine.limits import EngineLimits
from server.engine.policy import EVICTION_POLICIES

Progress = Callable[[str, float], None]

CUDA_HOST_BYTES, HOST_SHARE = 8 << 30, 0.25  # the host tier beside a GPU: no more than either


def build_engine(config: EngineConfig, progress: Progress) -> tuple[Engine, EngineDescription]:
    """Load, attach, check. `progress(stage, fraction)` is called as things go on.

    Raises:
        EngineStartError: the model cannot be served, or there is no room for it.
    """
    parts = build_device(config, progress)
    base, cache = parts.base, parts.cache
    blocks = BlockManager(cache.num_units, enable_prefix_caching=config.enable_prefix_caching)
    unit_bytes = base.kv_shape.unit_bytes
    worth_of = EVICTION_POLICIES[config.adapter_eviction]
    host = HostImages(_host_bytes(config, parts.device), lock_pages=parts.device.type == "cuda", worth_of=worth_of)
    adapters = AdapterManager(
        blocks,
        PoolReader(cache.pool, unit_bytes, host),
        parts.residency,
        unit_bytes=unit_bytes,
        clock=time.monotonic,
        max_bytes=config.adapter_bytes,
        worth_of=worth_of,
    )
    limits = EngineLimits(base.max_model_len, parts.vocab_size, base.eos_token_ids, cache.num_units, unit_bytes)
    engine = Engine(config, limits, parts.runner, adapters, blocks)
    progress("ready", 1.0)
    return engine, _description(config, parts, limits)


def _host_bytes(config: EngineConfig, device: torch.device) -> int:
    """Room of the host tier. On a CPU the pool is host memory itself, so there it has to be asked for."""
    if config.host_adapter_bytes is not None:
        return config.host_adapter_bytes
    if device.type == "cpu":
        return 0
    return int(min(CUDA_HOST_BYTES, HOST_SHARE * psutil.virtual_memory().available))


def _description(config: EngineConfig, parts: DeviceParts, limits: EngineLimits) -> EngineDescription:
    base = parts.base
    return EngineDescription(
        spec=base.spec.to_json(),
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        eos_token_ids=limits.eos_token_ids,
        num_units=limits.num_units,
        unit_bytes=limits.unit_bytes,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        dtype=dtype_name(base.model.dtype),
        device=base.model.device.type,
        adapter_dtype=parts.residency.dtype_name,
        base_directory=str(base.directory.resolve()),
    )
