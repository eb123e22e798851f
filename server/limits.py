"""How much processor and memory this process may really use.

Inside a container `os.cpu_count()` and `/proc/meminfo` tell of the host; the limits are in the control group. This
file knows where Linux writes them (version 2, and version 1 where that is what is mounted) and nothing else; whoever
sizes threads or memory pools asks here.

Running example: `docker run --cpus 2 --memory 8g` on a host of 64 processors
    cpu.max = "200000 100000"     -> cpu_limit()    == 2
    memory.max = "8589934592"     -> memory_limit_bytes() == 8589934592
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a page-aligned number near 2**63


def cpu_limit(root: Path = CGROUP_ROOT) -> int:
    """Processors this process may keep busy at once: affinity and control group together, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(root)
    if quota is None:
        return max(1, allowed)
    return max(1, min(allowed, math.floor(quota)))


def memory_limit_bytes(root: Path = CGROUP_ROOT) -> int:
    """Bytes of memory this process may use: the smaller of the control group's limit and the machine's memory."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _memory_limit(root)
    return physical if limit is None else min(physical, limit)


def _cpu_quota(root: Path) -> float | None:
    for folder in _own_groups(root, "cpu"):
        fields = _read(folder / "cpu.max").split()
        if len(fields) == 2 and fields[0] != "max":
            return int(fields[0]) / int(fields[1])
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            return int(quota) / int(period)
    return None


def _memory_limit(root: Path) -> int | None:
    limits = []
    for folder in _own_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdigit() and int(text) < _UNLIMITED_BYTES:
                limits.append(int(text))
    return min(limits) if limits else None


def _own_groups(root: Path, controller: str) -> list[Path]:
    """Folders that may hold this process's limits, its own group first, then the groups above it."""
    folders: list[Path] = []
    for base, path in ((root, _own_path("")), (root / controller, _own_path(controller))):
        if path is None:
            continue
        group = base / path.lstrip("/")
        folders += [group, *(parent for parent in group.parents if parent.is_relative_to(base))]
    return [*dict.fromkeys([*folders, root, root / controller])]


def _own_path(controller: str) -> str | None:
    """This process's group for one version 1 controller; "" asks for the version 2 group."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
