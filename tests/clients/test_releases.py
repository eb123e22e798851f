"""A release on a running server: gated, canaried, moved, rolled back, and the same by vLLM's routes."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.clients.running import RunningServer
from tests.clients.served_model import VOCAB, ServedModel
from tests.tiny_models import attention_targets, make_lora, make_model

SQL = "/admin/v1/adapters/sql"
PROD = SQL + "/aliases/prod"
PROMPT = "select"


@pytest.fixture(scope="module")
def running(model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("releases")
    arguments = [str(model.base), "--store-dir", str(root / "store"), "--pool-bytes", "64M"]
    arguments += ["--adapter-roots", str(model.adapters), "--allow-runtime-lora-updating"]
    with RunningServer(root, arguments) as server:
        for name in ("poet", "sql"):
            assert upload(server, model.adapters / name, promote=name == "poet") == 201
        yield server


def upload(server: RunningServer, directory: Path, **metadata: Any) -> int:
    files: list[Any] = [("metadata", (None, json.dumps({"name": "sql", **metadata})))]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        files.append(("files", (name, (directory / name).read_bytes())))
    return httpx.post(server.url + "/admin/v1/adapters", files=files, timeout=60).status_code


def put(server: RunningServer, path: str, body: Any) -> httpx.Response:
    return httpx.put(server.url + path, json=body, timeout=60)


def ask(server: RunningServer, adapter: str, **fields: Any) -> tuple[int, str]:
    body = {"inputs": PROMPT, "adapter": adapter, "parameters": {"max_new_tokens": 8}, **fields}
    answer = server.post("/generate", body)
    assert answer.status_code == 200, answer.text
    return int(answer.headers["x-adapter-version"]), str(answer.json()["generated_text"])


def test_a_shared_alias_answers_as_exactly_one_of_its_versions(running: RunningServer) -> None:
    texts = {version: ask(running, f"sql@{version}")[1] for version in (1, 2)}
    assert texts[1] != texts[2]
    assert put(running, PROD, {"weights": {"1": 50, "2": 50}}).status_code == 200
    seen: Counter[int] = Counter()
    for number in range(30):
        version, text = ask(running, "sql@prod", sticky_key=f"user-{number}")
        assert text == texts[version]
        assert ask(running, "sql@prod", sticky_key=f"user-{number}")[0] == version
        seen[version] += 1
    assert set(seen) == {1, 2}


def test_a_rollback_takes_less_than_a_second(running: RunningServer) -> None:
    put(running, PROD, {"version": 1})
    put(running, PROD, {"version": 2})
    assert ask(running, "sql@prod")[0] == 2
    began_s = time.perf_counter()
    assert running.post(PROD + "/rollback", None).status_code == 200
    version, _ = ask(running, "sql@prod")
    assert (version, time.perf_counter() - began_s < 1.0) == (1, True)


def test_golden_prompts_are_asked_of_the_model(running: RunningServer) -> None:
    put(running, PROD, {"version": 1})
    wanted = ask(running, "sql@2")[1]
    gate = {"prompts": [{"inputs": PROMPT, "max_new_tokens": 8, "equals": wanted}]}
    assert put(running, PROD + "/gate", gate).status_code == 200
    assert put(running, PROD, {"version": 2}).status_code == 200
    gate["prompts"][0]["equals"] = ask(running, "sql@1")[1]
    put(running, PROD + "/gate", gate)
    assert put(running, PROD, {"version": 1}).status_code == 200
    refused = put(running, PROD, {"version": 2})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "gate_failed")
    assert httpx.delete(running.url + PROD + "/gate").status_code == 204


def test_a_pinned_adapter_stays_on_the_device(running: RunningServer) -> None:
    assert httpx.patch(running.url + SQL, json={"pinned": True}, timeout=60).status_code == 200
    deadline_s = time.monotonic() + 20
    while not any(one["pinned"] and one["state"] == "device" for one in running.cache()["residents"]):
        assert time.monotonic() < deadline_s, running.cache()
        time.sleep(0.05)
    assert running.post(SQL + "/unload", {"version": 1}).status_code == 409
    evicted = running.post("/admin/v1/cache/evict", {"target_bytes": 0}).json()
    assert "sql@1" not in evicted["evicted"]
    assert httpx.patch(running.url + SQL, json={"pinned": False}, timeout=60).status_code == 200
    running.wait_until_idle()
    assert running.post(SQL + "/unload", {"version": 1}).status_code == 200


def test_a_client_of_vllms_loads_uses_replaces_and_unloads(
    running: RunningServer, model: ServedModel, tmp_path: Path
) -> None:
    load = {"lora_name": "tenant", "lora_path": str(model.adapters / "poet")}
    answer = running.post("/v1/load_lora_adapter", load)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'tenant' added successfully.")
    assert ask(running, "tenant")[1] == ask(running, "sql@1")[1]
    assert running.post("/v1/load_lora_adapter", load).status_code == 400
    replaced = {**load, "lora_path": str(model.adapters / "sql"), "load_inplace": True}
    assert running.post("/v1/load_lora_adapter", replaced).status_code == 200
    assert ask(running, "tenant")[1] == ask(running, "sql@2")[1]
    shutil.copytree(model.adapters / "poet", tmp_path / "outside")
    outside = running.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(tmp_path / "outside")})
    assert outside.status_code == 403
    gone = running.post("/v1/unload_lora_adapter", {"lora_name": "tenant"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'tenant' removed successfully.")
    assert running.post("/generate", {"inputs": "a", "adapter": "tenant"}).status_code == 404


def test_a_callers_own_mistakes_and_departures_do_not_end_a_canary(running: RunningServer, tmp_path: Path) -> None:
    base = make_model("llama", seed=1, vocab_size=VOCAB)
    make_lora(base, tmp_path / "third", rank=2, alpha=32, targets=attention_targets("llama"), seed=5)
    assert upload(running, tmp_path / "third", promote=False) == 201
    version = httpx.get(running.url + SQL).json()["latest_version"]
    put(running, PROD, {"version": 1})
    running.wait_until_idle()
    order = {"version": version, "percent": 50, "max_error_rate": 0.1, "min_requests": 3, "window": 10}
    assert running.post(PROD + "/canary", order).status_code == 201
    for _ in range(40):
        answer = running.post("/generate", {"inputs": "a" * 3000, "adapter": f"sql@{version}"})
        assert answer.status_code == 422, "a caller's own mistake is no failure of the canary"
    assert httpx.get(running.url + PROD + "/canary").json()["state"] == "running"
    fail = {"inputs": "a", "adapter": f"sql@{version}", "parameters": {"max_new_tokens": 1500}}
    for _ in range(3):
        with httpx.stream("POST", running.url + "/generate_stream", json=fail, timeout=60) as stream:
            next(stream.iter_lines())  # and leaves: that is none either
    assert httpx.get(running.url + PROD + "/canary").json()["state"] == "running"
    assert httpx.delete(running.url + PROD + "/canary").json()["state"] == "stopped"


def test_the_command_line_does_the_same(running: RunningServer) -> None:
    def veneer(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["adapters", *arguments], env={"VENEER_URL": running.url})
        assert result.exit_code == 0, result.output
        return result.output

    assert veneer("alias", "sql", "prod", "1=90", "2=10") == "sql@prod means 1:90%+2:10%\n"
    veneer("alias", "sql", "prod", "2")
    assert veneer("rollback", "sql", "--alias", "prod") == "sql@prod means 1:90%+2:10% again\n"
    assert "alias.rollback" in veneer("audit", "sql")
    assert json.loads(veneer("ls", "--json"))[0]["name"] == "sql"
