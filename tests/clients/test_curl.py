"""`curl`, and the three commands that a start prints: they work when pasted."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tests.clients.running import RunningServer
from tests.clients.served_model import ServedModel

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def shell(command: str) -> str:
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_printed_commands_work_when_pasted(server: RunningServer) -> None:
    base, adapter, stream = [line for line in server.output.splitlines() if line.startswith("curl ")]
    assert json.loads(shell(base))["generated_text"] != json.loads(shell(adapter))["generated_text"]
    events = [line for line in shell(stream).splitlines() if line]
    assert all(event.startswith("data: {") for event in events)
    assert len(events) == 100
    assert json.loads(events[-1].removeprefix("data: "))["generated_text"]


def test_stages_are_told_with_their_times(server: RunningServer) -> None:
    stages = server.output[: server.output.index("Veneer serves")]
    for stage in ("load weights", "self-check", "adapters"):
        assert stage in stages
    assert "with 2 adapters" in server.output


def test_an_adapter_is_uploaded_by_curl(server: RunningServer, model: ServedModel) -> None:
    command = f"""curl -s {server.url}/admin/v1/adapters -F 'metadata={{"name": "by-curl"}}' """
    command += " ".join(
        f"-F files=@{model.guest}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    version = json.loads(shell(command))
    assert (version["name"], version["state"]) == ("by-curl", "ready")
    body = json.dumps({"inputs": "hello", "adapter": "by-curl", "parameters": {"max_new_tokens": 4}})
    answer = shell(f"curl -s {server.url}/generate -H 'Content-Type: application/json' -d '{body}'")
    assert "generated_text" in json.loads(answer)
