"""What this machine can do at best, measured in the same run as everything that is compared with it."""

from __future__ import annotations

import time

import torch

_BYTES = 512 << 20  # far beyond any cache


def read_bandwidth(repeats: int = 9, num_bytes: int = _BYTES) -> float:
    """Bytes per second that all threads together can read from memory: the best of some sums over a large array."""
    values = torch.ones(num_bytes // 4)
    best_s = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        values.sum()
        best_s = min(best_s, time.perf_counter() - start_s)
    return num_bytes / best_s
