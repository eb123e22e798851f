"""`lorax-client` 0.6.3 and `text-generation` 0.7.0, unmodified, against a running server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.running import RunningServer

SCRIPT = Path(__file__).with_name("old_clients_script.py")


@pytest.fixture(scope="module")
def findings(server: RunningServer, old_clients: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(old_clients)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), server.url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_lorax_client_gets_answers_streams_and_errors(findings: dict[str, Any]) -> None:
    found = findings["lorax"]
    assert found["poet"] == found["streamed"] == found["async"]
    assert found["poet"] != found["plain"]
    assert (found["tokens"], found["stream_tokens"], found["alternatives"]) == (6, 6, 2)
    assert found["prompt_tokens"] == found["prefill"] == len("once upon")
    assert "nobody" in found["unknown"]
    assert "1000000" in found["invalid"]


def test_text_generation_gets_answers_streams_and_errors(findings: dict[str, Any]) -> None:
    found = findings["text_generation"]
    assert found["plain"] == found["streamed"] == findings["lorax"]["plain"]
    assert (found["tokens"], found["top"], found["best_of"]) == (6, 2, 1)
    assert "1000000" in found["invalid"]
