"""The `veneer` command: what it prints, and exit codes that scripts can trust."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.version import VERSION
from tests.api.conftest import safetensors_bytes
from tests.api.fake_server import FakeServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with FakeServer(tmp_path_factory.mktemp("cli") / "store") as running:
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors_bytes())
    (tmp_path / "optimizer.pt").write_bytes(b"not for the server")
    return tmp_path


def veneer(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env=environment)


def test_the_version_is_printed() -> None:
    assert veneer("version").output == f"{VERSION}\n"


def test_the_settings_are_shown_with_their_origin_and_without_keys() -> None:
    shown = veneer("config", "show", "--port", "9", VENEER_API_KEY="hunter2").output
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert lines["port"] == ["9", "--port"]
    assert lines["api_key"] == ["********", "VENEER_API_KEY"]
    assert "hunter2" not in shown


def test_serve_has_a_help_with_headings() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--help"], capture_output=True, text=True, check=True
    )
    for heading in ("Model:", "Network:", "Keys:", "Adapters:", "Load:", "Memory and threads:", "Observing:"):
        assert heading in done.stdout


def test_no_command_of_the_front_imports_torch() -> None:
    code = "import sys, server.cli, server.api.app, server.serve; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_adapter_is_pushed_listed_loaded_evicted_and_removed(server: FakeServer, adapter: Path) -> None:
    where = {"VENEER_URL": server.url}
    assert "pirate@1 is ready" in veneer("adapters", "push", "pirate", str(adapter), **where).output
    again = json.loads(veneer("adapters", "push", "pirate", str(adapter), "--json", **where).output)
    assert again["version"] == 1
    assert [file["path"] for file in again["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    assert veneer("adapters", "load", "pirate", **where).exit_code == 0
    listed = veneer("adapters", "list", **where).output.splitlines()
    assert listed[1].split()[:4] == ["pirate", "1", "ready", "ready"]
    assert json.loads(veneer("adapters", "show", "pirate", **where).output)["aliases"] == {"default": 1}
    assert veneer("adapters", "evict", "pirate", **where).exit_code == 0
    assert veneer("adapters", "rm", "pirate", **where).output == "pirate is deleted\n"
    assert json.loads(veneer("adapters", "list", "--json", **where).output) == []


def test_a_dry_run_keeps_nothing(server: FakeServer, adapter: Path) -> None:
    where = {"VENEER_URL": server.url}
    assert "would be taken" in veneer("adapters", "push", "x", str(adapter), "--dry-run", **where).output
    assert json.loads(veneer("adapters", "list", "--json", **where).output) == []


def test_exit_codes_tell_no_from_nobody(server: FakeServer) -> None:
    said_no = veneer("adapters", "rm", "nobody", VENEER_URL=server.url)
    assert (said_no.exit_code, "no adapter 'nobody'" in said_no.stderr) == (1, True)
    unreachable = veneer("adapters", "list", VENEER_URL="http://127.0.0.1:9")
    assert (unreachable.exit_code, "no answer from http://127.0.0.1:9" in unreachable.stderr) == (3, True)
    assert veneer("adapters", "list", VENEER_URL="ftp://x").exit_code == 2
    assert veneer("adapters", "push", "x", "/nowhere", VENEER_URL=server.url).exit_code == 2


def test_a_directory_is_inspected_without_a_server(adapter: Path) -> None:
    found = json.loads(veneer("adapters", "inspect", str(adapter), "--json").output)
    assert (found["kind"], found["r"], found["tensors"], found["dtypes"]) == ("LORA", 4, 1, "F32")
    assert (found["served"], found["reason"]) == (None, None)
    assert found["left_out"] == "optimizer.pt"
    (adapter / "adapter_model.safetensors").write_bytes(safetensors_bytes()[:-1])
    broken = veneer("adapters", "inspect", str(adapter))
    assert broken.exit_code == 1
    assert "Traceback" not in broken.output
