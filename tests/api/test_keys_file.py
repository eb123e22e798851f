"""The keys file and the commands that change it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli_keys import app
from server.keys import KeyRecord, KeysFile, KeysFileError, add_key, digest_of, read_keys, revoke_key

NOW = datetime(2026, 11, 25, tzinfo=UTC)


def record(name: str, **fields: object) -> KeyRecord:
    values = {"name": name, "sha256": digest_of(name), "scopes": ["generate"], "created_at": NOW, **fields}
    return KeyRecord.model_validate(values)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


def test_a_key_is_printed_once_and_its_digest_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    status, printed = run(
        "add", "bi", "--file", str(path), "--adapters", "sql", "--adapters", "bi/*", "--scope", "read"
    )
    assert status == 0
    key = printed.strip()
    assert key.startswith("vnr_")
    assert len(key) > 40
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = KeysFile(path).find(key)
    assert found is not None
    assert (found.name, found.scopes, found.adapters, found.base) == ("bi", ("read",), ("sql", "bi/*"), True)
    assert KeysFile(path).find(key[:-1]) is None
    status, printed = run("list", "--file", str(path), "--json")
    assert json.loads(printed)[0]["name"] == "bi"
    assert "sha256" not in printed


def test_commands_end_with_codes_that_scripts_can_trust(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    assert run("list", "--file", path)[0] == 1
    assert run("revoke", "bi", "--file", path)[0] == 1
    assert run("add", "bi", "--file", path, "--scope", "everything")[0] == 2
    assert run("add", "b i", "--file", path)[0] == 2
    assert run("add", "bi", "--file", path, "--adapters", "*sql")[0] == 2
    assert not Path(path).exists(), "nothing is left of what was refused"
    assert run("add", "bi", "--file", path)[0] == 0
    assert run("add", "bi", "--file", path)[0] == 1
    assert run("revoke", "bi", "--file", path)[0] == 0
    assert read_keys(Path(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"keys": []}',
        '{"schema": 2, "keys": []}',
        '{"schema": 1, "keys": [], "more": 1}',
        '{"schema": 1, "keys": [{"name": "a", "scopes": ["generate"], "created_at": "2026-11-25T00:00:00Z"}]}',
    ],
)
def test_a_file_that_is_no_keys_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(KeysFileError):
        read_keys(path)


@pytest.mark.parametrize("fields", [{"sha256": digest_of("a")}, {"created_at": datetime(2026, 1, 1)}])  # noqa: DTZ001
def test_twins_and_times_without_a_zone_are_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    path = tmp_path / "keys.json"
    add_key(path, record("a"))
    add_key(path, record("b", **fields))
    with pytest.raises(KeysFileError):
        read_keys(path)


def test_a_key_opens_until_it_expires(tmp_path: Path) -> None:
    path, now = tmp_path / "keys.json", [NOW]
    add_key(path, record("a", expires_at=NOW + timedelta(seconds=1)))
    keys = KeysFile(path, now=lambda: now[0])
    assert keys.find("a") is not None
    now[0] += timedelta(seconds=1)
    assert keys.find("a") is None


def test_a_file_that_is_swapped_for_one_of_equal_size_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, record("a"))
    keys = KeysFile(path)
    before = path.stat()
    other = tmp_path / "other.json"
    add_key(other, record("b"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert other.stat().st_size == before.st_size
    os.replace(other, path)
    assert keys.find("a") is None
    assert keys.find("b") is not None


def test_many_processes_may_change_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    command = [sys.executable, "-m", "server", "keys", "add", "--file", str(path)]
    running = [subprocess.Popen([*command, f"key{number}"], stdout=subprocess.PIPE) for number in range(4)]
    keys = [process.communicate(timeout=60)[0].decode().strip() for process in running]
    assert [process.returncode for process in running] == [0] * 4
    found = [KeysFile(path).find(key) for key in keys]
    assert [None if one is None else one.name for one in found] == [f"key{number}" for number in range(4)]
    revoke_key(path, "key2")
    assert len(read_keys(path)) == 3
    assert list(tmp_path.iterdir()) == [path]
