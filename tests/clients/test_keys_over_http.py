"""Keys, tenants and the ledger as operators and tenants of a running server meet them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.clients.running import RunningServer
from tests.clients.served_model import ServedModel

LONG_PROMPT = "Preheat the oven and wait until all of it is hot, then go on."  # several blocks of 16 tokens


class Keyed(NamedTuple):
    server: RunningServer
    keys_file: Path
    admin_url: str
    keys: dict[str, str]

    def ask(self, key: str, **body: Any) -> httpx.Response:
        body = {"inputs": LONG_PROMPT, "parameters": {"max_new_tokens": 4, "details": True}, **body}
        return self.server.post("/generate", body, headers={"Authorization": f"Bearer {self.keys[key]}"})

    def skipped(self, key: str, **body: Any) -> int:
        """Prompt tokens that the prefix cache saved."""
        return int(self.ask(key, **body).json()["details"]["skipped_tokens"])

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {self.keys[key]}"}
        return httpx.get(self.admin_url + path, headers=headers, timeout=60)


def veneer(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def add_key(keys_file: Path, name: str, *options: str) -> str:
    added = veneer("keys", "add", name, "--file", str(keys_file), *options)
    assert added.returncode == 0, added.stderr
    return added.stdout.strip()


@pytest.fixture(scope="module")
def keyed(model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    root = tmp_path_factory.mktemp("keyed")
    keys_file = root / "keys.json"
    keys = {
        "boss": add_key(keys_file, "boss", "--scope", "admin", "--scope", "read", "--scope", "generate"),
        "verse": add_key(keys_file, "verse", "--adapters", "poet", "--scope", "generate", "--scope", "read"),
        "rhyme": add_key(keys_file, "rhyme", "--tenant", "verse"),
        "other": add_key(keys_file, "other"),
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        admin_port = free.getsockname()[1]
    arguments = [str(model.base), "--adapters-dir", str(model.adapters), "--store-dir", str(root / "store")]
    arguments += ["--pool-bytes", "64M", "--keys-file", str(keys_file), "--host", "127.0.0.1"]
    with RunningServer(root, [*arguments, "--admin-port", str(admin_port)]) as server:
        yield Keyed(server, keys_file, f"http://127.0.0.1:{admin_port}", keys)


def test_a_tenant_sees_its_adapter_and_no_other(keyed: Keyed) -> None:
    assert keyed.ask("verse", adapter="poet").status_code == 200
    hidden, never = keyed.ask("verse", adapter="sql"), keyed.ask("verse", adapter="nil")
    assert (hidden.status_code, hidden.text) == (404, never.text.replace("nil", "sql"))
    assert keyed.ask("boss", adapter="sql").status_code == 200
    for path in ("/metrics", "/info", "/admin/v1/adapters", "/admin/v1/cache"):
        assert "sql" not in keyed.get(path, "verse").text, path
        assert "sql" not in keyed.get(path).text, path
    assert "sql" in keyed.get("/metrics", "boss").text, "the negative control: it is told to whoever sees it"


def test_a_cached_prompt_of_another_tenant_saves_nothing(keyed: Keyed) -> None:
    prompt = {"inputs": "Once upon a time there was a long prompt that nobody else had sent before."}
    assert keyed.skipped("verse", adapter="poet", **prompt) == 0
    assert keyed.skipped("verse", adapter="poet", **prompt) > 0, "its own is found"
    assert keyed.skipped("other", adapter="poet", **prompt) == 0
    assert keyed.skipped("rhyme", adapter="poet", **prompt) > 0, "another key of the tenant shares it"


def test_admin_routes_are_at_the_admin_port_alone(keyed: Keyed) -> None:
    boss = {"Authorization": f"Bearer {keyed.keys['boss']}"}
    assert httpx.get(keyed.server.url + "/admin/v1/adapters", headers=boss).status_code == 404
    assert keyed.get("/admin/v1/adapters", "boss").status_code == 200
    assert keyed.get("/admin/v1/adapters").status_code == 401
    spoofed = {**boss, "Host": keyed.admin_url.removeprefix("http://")}
    assert httpx.get(keyed.server.url + "/admin/v1/adapters", headers=spoofed).status_code == 404


def test_keys_come_and_go_while_the_server_runs(keyed: Keyed) -> None:
    keyed.keys["guest"] = add_key(keyed.keys_file, "guest")
    assert keyed.ask("guest").status_code == 200
    assert veneer("keys", "revoke", "guest", "--file", str(keyed.keys_file)).returncode == 0
    assert keyed.ask("guest").status_code == 401


def test_the_ledger_counts_by_key_and_version(keyed: Keyed) -> None:
    key = keyed.keys["counted"] = add_key(keyed.keys_file, "counted", "--scope", "generate", "--scope", "read")
    for adapter in ("poet", "poet", None):
        assert keyed.ask("counted", adapter=adapter).status_code == 200
    time.sleep(1.0)
    told = veneer("keys", "usage", "--url", keyed.admin_url, "--key", key, "--json")
    rows = {row["adapter"]: row for row in json.loads(told.stdout) if row["key"] == "counted"}
    assert set(rows) == {None, "poet"}
    assert (rows["poet"]["version"], rows["poet"]["requests"], rows["poet"]["unfinished"]) == (1, 2, 0)
    assert rows["poet"]["generated_tokens"] == 8
    assert rows["poet"]["prompt_tokens"] == 2 * len(LONG_PROMPT)
    assert rows["poet"]["cached_tokens"] > 0
    assert veneer("keys", "usage", "--url", keyed.admin_url, "--key", "wrong").returncode == 1


def test_what_was_used_outlives_a_server_that_is_killed(model: ServedModel, tmp_path: Path) -> None:
    arguments = [str(model.base), "--store-dir", str(tmp_path / "store"), "--pool-bytes", "64M", "--api-key", "k"]
    headers = {"Authorization": "Bearer k"}
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 2}}

    def requests(server: RunningServer) -> int:
        found = httpx.get(server.url + "/admin/v1/usage", headers=headers, timeout=60).json()["data"]
        return sum(row["requests"] for row in found)

    with RunningServer(tmp_path, arguments) as server:
        for _ in range(3):
            assert server.post("/generate", body, headers=headers).status_code == 200
        time.sleep(1.0)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(30)
    with RunningServer(tmp_path, arguments) as server:
        assert requests(server) == 3
        assert server.post("/generate", body, headers=headers).status_code == 200
    with RunningServer(tmp_path, arguments) as server:
        assert requests(server) == 4, "a server that ends writes what it has"


def test_a_server_without_its_keys_file_does_not_start(model: ServedModel, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="there is no keys file"):
        RunningServer(tmp_path, [str(model.base), "--keys-file", str(tmp_path / "none.json")]).__enter__()
