"""What of the machine the server may use."""

from __future__ import annotations

from typing import Literal

from server.setting_groups.field import SettingGroup, setting
from server.setting_groups.values import Size


class MemorySettings(SettingGroup):
    heading = "Memory and threads"

    pool_bytes: Size | None = setting(
        None,
        "Memory for K/V blocks and adapters together. Default: sized from the machine's or container's limit.",
        gt=0,
        metavar="SIZE",
        aliases=("--kv-cache-memory-bytes",),
    )
    adapter_memory: Size | None = setting(
        None,
        "Most of the pool that adapters may take. Default: whatever K/V blocks leave.",
        gt=0,
        metavar="SIZE",
    )
    host_adapter_memory: Size | None = setting(
        None,
        "Memory outside the pool for copies of adapters, from which they come back without the disk. Default: 0 on a "
        "CPU, where the pool is host memory itself and the page cache does the same; beside a GPU up to 8G.",
        ge=0,
        metavar="SIZE",
    )
    adapter_eviction: Literal["weighed", "lru"] = setting(
        "weighed",
        "Which idle adapter goes: by age, use, size and cost to reload, or by age alone.",
    )
    enable_prefix_caching: bool = setting(True, "Keep K/V of finished prompts and reuse them for equal beginnings.")
    num_threads: int | None = setting(
        None, "Threads of the engine. Default: the processors this process may use.", gt=0
    )
