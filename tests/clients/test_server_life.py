"""A server's start and end as its operator sees them."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.clients.running import RunningServer
from tests.clients.served_model import ServedModel

NUM_TOKENS = 300  # enough that the signal comes in the middle


def test_sigterm_lets_streams_finish_and_takes_no_new_ones(model: ServedModel, tmp_path: Path) -> None:
    arguments = [str(model.base), "--store-dir", str(tmp_path / "store"), "--pool-bytes", "64M"]
    arguments += ["--lora-modules", f"poet={model.adapters / 'poet'}", "--api-key", "user", "--host", "127.0.0.1"]
    with RunningServer(tmp_path, arguments, VENEER_ADMIN_API_KEY="boss") as server:
        key = {"Authorization": "Bearer user"}
        assert server.post("/generate", {"inputs": "a"}).status_code == 401
        assert httpx.get(server.url + "/admin/v1/adapters", headers=key).status_code == 403
        boss = httpx.get(server.url + "/admin/v1/adapters", headers={"Authorization": "Bearer boss"})
        assert [adapter["name"] for adapter in boss.json()["data"]] == ["poet"]

        started, lines = threading.Event(), list[str]()

        def read_stream() -> None:
            body = {"inputs": "once", "adapter": "poet", "parameters": {"max_new_tokens": NUM_TOKENS}}
            with httpx.stream("POST", server.url + "/generate_stream", json=body, headers=key, timeout=60) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    started.set()

        reader = threading.Thread(target=read_stream)
        reader.start()
        assert started.wait(30)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        health = httpx.get(server.url + "/health")
        refused = server.post("/generate", {"inputs": "a"}, headers=key)
        assert (health.status_code, refused.status_code, refused.json()["error_type"]) == (503, 503, "draining")
        reader.join(60)
        last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
        assert (last["index"], last["generated_text"] is None) == (NUM_TOKENS, False)
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.output
        assert "boss" not in server.output, "keys are never printed"


def test_a_second_signal_ends_the_server_and_its_workers_at_once(model: ServedModel, tmp_path: Path) -> None:
    arguments = [str(model.base), "--store-dir", str(tmp_path / "store"), "--pool-bytes", "64M", "--host", "0.0.0.0"]
    with RunningServer(tmp_path, arguments) as server:
        assert "no API key is set" in server.output
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        workers = children_of(server.process.pid)
        assert len(workers) == 2
        body = {"inputs": "once", "parameters": {"max_new_tokens": 1500}}
        with httpx.stream("POST", url + "/generate_stream", json=body, timeout=60) as answer:
            lines = answer.iter_lines()  # kept: the connection closes with it
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.poll() is None, "the stream has time to finish"
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5) == 1
        deadline_s = time.monotonic() + 10
        while any(is_running(pid) for pid in workers) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not any(is_running(pid) for pid in workers)
        assert "Traceback" not in server.output


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie that somebody else has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/nowhere/at/all"], 3, "/nowhere/at/all"),
        (["--prot", "1"], 2, "did you mean --port"),
        (["--host", "203.0.113.7"], 3, "203.0.113.7"),
    ],
)
def test_a_start_that_cannot_work_says_why_and_ends(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        RunningServer(tmp_path, arguments).__enter__()
    output = (tmp_path / "server.log").read_text()
    assert words in output
    assert "Traceback" not in output
