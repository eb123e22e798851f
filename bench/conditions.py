"""Where and with what a number was measured. A number without its conditions is not a result."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_LOAD_AT_START = os.getloadavg()[0]  # of others: this process has done nothing yet
_PACKAGES = ("torch", "transformers", "peft", "numpy")


def conditions(**of_this_run: object) -> dict[str, object]:
    """What stands above every table: machine, versions, date, commit, then what this run adds."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        **_gpu(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_at_start": round(_LOAD_AT_START, 2),
        **of_this_run,
    }


def cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of the tree, with a + if tracked files were changed since; "unknown" outside a repository."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--"], cwd=here, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("+" if changed.returncode else "")


def _gpu() -> dict[str, object]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
