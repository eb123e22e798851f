"""`veneer adapters alias|rollback|canary|gate|pin|audit|rm` against a server: what they print, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from tests.api.conftest import safetensors_bytes
from tests.api.fake_server import FakeServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(tmp_path / "store") as running:
        for rank in (1, 2, 3):
            files: list[Any] = [
                ("metadata", (None, json.dumps({"name": "sql", "promote": rank == 1}))),
                ("files", ("adapter_config.json", b'{"r": %d}' % rank)),
                ("files", ("adapter_model.safetensors", safetensors_bytes())),
            ]
            assert httpx.post(running.url + "/admin/v1/adapters", files=files).status_code == 201
        yield running


def adapters(server: FakeServer, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["adapters", *arguments], env={"VENEER_URL": server.url})


def said(server: FakeServer, *arguments: str) -> str:
    result = adapters(server, *arguments)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def as_json(server: FakeServer, *arguments: str) -> Any:
    return json.loads(said(server, *arguments, "--json"))


def test_an_alias_is_set_shared_shown_rolled_back_and_forgotten(server: FakeServer) -> None:
    assert said(server, "alias", "sql", "prod", "1") == "sql@prod means 1"
    assert said(server, "alias", "sql", "prod", "1=90", "2=10") == "sql@prod means 1:90%+2:10%"
    assert "prod=1:90%+2:10%" in said(server, "ls")
    assert as_json(server, "alias", "sql", "prod")["weights"] == {"1": 90, "2": 10}
    assert said(server, "rollback", "sql", "--alias", "prod") == "sql@prod means 1 again"
    nothing = adapters(server, "rollback", "sql", "--alias", "prod")
    assert (nothing.exit_code, "veneer: " in nothing.stderr) == (1, True)
    assert said(server, "alias", "sql", "prod", "--delete") == "sql@prod is forgotten"
    assert adapters(server, "alias", "sql", "prod").exit_code == 1


def test_a_canary_is_started_shown_promoted_and_stopped(server: FakeServer) -> None:
    started = said(server, "canary", "sql", "2", "--percent", "25")
    assert started == "the canary sql@2 under 'default' runs: 1:75%+2:25%, 0 of 0 requests failed"
    assert as_json(server, "canary", "sql")["state"] == "running"
    assert "is over (moved)" in said(server, "canary", "sql", "--promote")
    assert as_json(server, "alias", "sql", "default")["weights"] == {"2": 1}
    said(server, "canary", "sql", "3")
    assert "is over (stopped)" in said(server, "canary", "sql", "--stop")
    assert adapters(server, "canary", "sql", "--stop").exit_code == 1
    assert adapters(server, "canary", "sql", "3", "--stop").exit_code == 2


def test_a_gate_is_set_asked_and_removed(server: FakeServer, tmp_path: Path) -> None:
    golden = tmp_path / "golden.json"
    golden.write_text(json.dumps({"prompts": [{"inputs": "a", "contains": ["certainly not"]}]}))
    assert said(server, "gate", "sql", "default", str(golden)) == "sql@default has 1 golden prompts"
    asked = adapters(server, "gate", "sql", "default", "--check", "2")
    assert (asked.exit_code, "sql@2 FAILED" in asked.output) == (1, True)
    moved = adapters(server, "alias", "sql", "default", "2")
    assert (moved.exit_code, "failed 1 of 1 golden prompts" in moved.stderr) == (1, True)
    assert said(server, "alias", "sql", "default", "2", "--skip-gate") == "sql@default means 2"
    said(server, "canary", "sql", "3", "--skip-gate")
    said(server, "canary", "sql", "--stop")
    assert adapters(server, "canary", "sql", "--promote").exit_code == 1
    said(server, "canary", "sql", "--promote", "--skip-gate")
    assert as_json(server, "alias", "sql", "default")["weights"] == {"3": 1}
    golden.write_text(json.dumps({"prompts": [{"inputs": "a", "contains": ["arr"]}]}))
    said(server, "gate", "sql", "default", str(golden))
    assert said(server, "gate", "sql", "default", "--check", "3") == "sql@3 passed"
    assert said(server, "gate", "sql", "default", "--remove") == "sql@default has no golden prompts"
    golden.write_text("[]")
    assert adapters(server, "gate", "sql", "default", str(golden)).exit_code == 2
    golden.write_text("{")
    assert adapters(server, "gate", "sql", "default", str(golden)).exit_code == 2


def test_adapters_and_versions_are_pinned(server: FakeServer) -> None:
    assert said(server, "pin", "sql") == "sql is pinned"
    assert as_json(server, "pin", "sql@2")["pinned_versions"] == [2]
    assert as_json(server, "pin", "sql@3")["pinned_versions"] == [2, 3]
    assert as_json(server, "pin", "sql@2", "--off")["pinned_versions"] == [3]
    assert said(server, "pin", "sql", "--off") == "sql is no longer pinned"
    assert adapters(server, "pin", "sql@prod").exit_code == 2
    assert adapters(server, "pin", "a,b").exit_code == 2
    assert adapters(server, "pin", "sql@9").exit_code == 1


def test_tiers_and_versions_are_loaded_evicted_and_removed(server: FakeServer) -> None:
    assert said(server, "load", "sql@2") == "sql@2 is on the device"
    assert as_json(server, "load", "sql", "--tier", "host")["version"] == 1
    assert said(server, "evict", "sql@2") == "sql@2 is off the device"
    assert as_json(server, "evict", "sql", "--tier", "all")["name"] == "sql"
    assert as_json(server, "rm", "sql@3") == {"name": "sql", "versions": [3], "requests_left": 0}
    meant = adapters(server, "rm", "sql@1")
    assert (meant.exit_code, "--force" in meant.stderr or "force" in meant.stderr) == (1, True)
    assert said(server, "rm", "sql@1", "--force") == "sql@1 is deleted"
    assert said(server, "rm", "sql") == "sql is deleted"


def test_the_audit_log_is_read(server: FakeServer) -> None:
    said(server, "alias", "sql", "prod", "2")
    assert "alias.set" in said(server, "audit", "sql").splitlines()[0]
    lines = as_json(server, "audit", "sql", "--limit", "1")
    assert [(line["action"], line["target"]) for line in lines] == [("alias.set", "sql@prod")]


@pytest.mark.parametrize(
    "arguments",
    [
        ("alias", "sql", "prod", "x"),
        ("alias", "sql", "prod", "1", "2"),
        ("alias", "sql", "prod", "1=90", "2"),
        ("alias", "sql", "prod", "1", "--delete"),
        ("alias", "sql", "prod", "1=x"),
        ("alias", "sql", "prod", "--skip-gate"),
        ("alias", "sql", "prod", "--delete", "--skip-gate"),
        ("canary", "sql", "2", "--percent", "100"),
        ("canary", "sql", "--percent", "50"),
        ("canary", "sql", "--stop", "--max-error-rate", "0.5"),
        ("canary", "sql", "--promote", "--window", "9"),
        ("canary", "sql", "--stop", "--skip-gate"),
        ("gate", "sql", "prod", "/nowhere.json"),
        ("load", "sql", "--tier", "moon"),
    ],
)
def test_wrong_usage_is_told_apart_from_a_servers_no(server: FakeServer, arguments: tuple[str, ...]) -> None:
    result = adapters(server, *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_nobody_there_is_told_apart(server: FakeServer) -> None:
    for arguments in (("alias", "sql", "prod", "1"), ("canary", "sql"), ("rm", "sql"), ("audit",), ("pin", "sql")):
        result = CliRunner().invoke(app, ["adapters", *arguments], env={"VENEER_URL": "http://127.0.0.1:9"})
        assert (result.exit_code, "no answer from" in result.stderr) == (3, True)


def test_a_push_draws_a_bar_on_a_terminal_and_none_elsewhere(server: FakeServer, tmp_path: Path) -> None:
    source = tmp_path / "poet"
    source.mkdir()
    (source / "adapter_config.json").write_text('{"r": 4}')
    (source / "adapter_model.safetensors").write_bytes(safetensors_bytes())
    command = ["adapters", "push", "poet", str(source)]
    shown = CliRunner().invoke(app, command, env={"VENEER_URL": server.url, "FORCE_COLOR": "1", "TERM": "xterm"})
    assert "poet@1 is ready" in shown.stdout
    assert "checking" in shown.stderr
    silent = CliRunner().invoke(app, command, env={"VENEER_URL": server.url})
    assert silent.stderr == ""
