"""The audit log's file: lines that survive, whoever writes and whatever a crash left."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters_store.audit_log import AuditEntry, AuditLog
from adapters_store.errors import DiskFull

WRITER = """
import sys
from pathlib import Path
from adapters_store.audit_log import AuditEntry, AuditLog
for number in range(50):
    AuditLog(Path(sys.argv[1])).append(AuditEntry(sys.argv[2], "alias.set", "sql@prod", {"n": number}))
"""


def test_lines_are_told_youngest_first(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    assert log.tail(10) == []
    for number in range(5):
        log.append(AuditEntry("me", "alias.set", f"sql@{number}"))
    assert [entry.target for entry in log.tail(2)] == ["sql@4", "sql@3"]
    assert all(entry.at.endswith("Z") for entry in log.tail(10))


def test_an_adapter_is_told_apart_from_one_whose_name_begins_alike(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    for target in ("sql", "sql@prod", "sqlite", "sqlite@1"):
        log.append(AuditEntry("me", "x", target))
    assert [entry.target for entry in log.tail(10, target="sql")] == ["sql@prod", "sql"]


def test_what_a_crash_left_of_a_line_spoils_no_other(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.append(AuditEntry("me", "x", "first"))
    with log.path.open("ab") as file:
        file.write(b'{"actor": "me", "acti')
    log.append(AuditEntry("me", "x", "second"))
    assert [entry.target for entry in log.tail(10)] == ["second", "first"]


def test_processes_and_threads_append_whole_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, f"process {number}"]) for number in range(2)]
    with ThreadPoolExecutor(4) as pool:
        for number in range(50):
            pool.submit(AuditLog(tmp_path).append, AuditEntry("thread", "x", str(number)))
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = (tmp_path / "audit.jsonl").read_bytes().splitlines()
    assert len(lines) == 150
    assert {json.loads(line)["actor"] for line in lines} == {"thread", "process 0", "process 1"}


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFull):
        AuditLog(tmp_path).append(AuditEntry("me", "x", "y"))
