"""Limits of a container are read from its control group, whichever version it is."""

from __future__ import annotations

from pathlib import Path

from server.limits import cpu_limit, memory_limit_bytes


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert cpu_limit(tmp_path) >= 1
    assert memory_limit_bytes(tmp_path) == memory_limit_bytes(tmp_path / "nothing here") > 2**20


def test_version_2_limits_count(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text("1048576\n")
    assert cpu_limit(tmp_path) == 1
    assert memory_limit_bytes(tmp_path) == 2**20


def test_version_1_limits_count(tmp_path: Path) -> None:
    for name, text in (
        ("cpu/cpu.cfs_quota_us", "50000"),
        ("cpu/cpu.cfs_period_us", "100000"),
        ("memory/memory.limit_in_bytes", "1048576"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    assert cpu_limit(tmp_path) == 1, "half a processor still runs one thread"
    assert memory_limit_bytes(tmp_path) == 2**20
