"""Two servers share one store, are killed with SIGKILL while clients change it, and are started again on it."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from adapters_store.catalog import Catalog
from adapters_store.names import parse_reference
from server.admin_client import AdminClient, RequestFailed
from server.library.directory import adapter_in
from tests.adapters_store.kill_script import NAME, Truth
from tests.clients.running import RunningServer
from tests.clients.served_model import ServedModel

NUM_ROUNDS = 4
_ADMIN = f"/admin/v1/adapters/{NAME}"


class Client:
    """Uploads, moves an alias of its own and deletes, until its server is gone; writes down questions and answers."""

    def __init__(self, url: str, number: int, seed: int, adapter: Path, log: Path) -> None:
        self._url = url
        self._number = number
        self._seed = seed
        self._random = random.Random(f"{seed}-{number}")
        self._adapter = adapter
        self._log = log
        self.doing = "upload"

    def run(self) -> None:
        with contextlib.suppress(httpx.TransportError, RequestFailed), self._log.open("w", buffering=1) as log:
            for step in range(10_000):
                self.upload(self._seed * 1000 + 2 * step + self._number, log)
                self.change(log)
                self.change(log)

    def upload(self, data: int, log: object) -> None:
        self.doing = "upload"
        (self._adapter / "README.md").write_text(str(data))
        print(json.dumps(["commit?", data]), file=log)  # type: ignore[call-overload]
        answer = AdminClient(self._url, None).push(NAME, adapter_in(self._adapter), alias=None)
        print(json.dumps(["commit", data, answer["version"]]), file=log)  # type: ignore[call-overload]

    def change(self, log: object) -> None:
        shown = httpx.get(self._url + _ADMIN, timeout=30).json()
        version = self._random.choice(shown["versions"])["version"]
        if self._random.random() < 0.6:
            self.doing, words = "alias", [f"w{self._number}", version]
            request = httpx.Request("PUT", f"{self._url}{_ADMIN}/aliases/{words[0]}", json={"version": version})
        else:
            self.doing, words = "delete", [version]
            request = httpx.Request("DELETE", f"{self._url}{_ADMIN}/versions/{version}")
        print(json.dumps([f"{self.doing}?", *words]), file=log)  # type: ignore[call-overload]
        with httpx.Client(timeout=30) as client:
            answer = client.send(request)
        assert answer.status_code < 500, answer.text
        if answer.is_success:
            print(json.dumps([self.doing, *words]), file=log)  # type: ignore[call-overload]


def read_data(catalog: Catalog, number: int) -> int:
    version = catalog.look_up(parse_reference(f"{NAME}@{number}"))
    return int(catalog.files_of(version)["README.md"].read_text())


@pytest.mark.slow
def test_servers_that_are_killed_lose_nothing_that_they_answered(model: ServedModel, tmp_path: Path) -> None:
    store = tmp_path / "store"
    truth, hits = Truth(read=read_data), Counter[str]()
    for seed in range(NUM_ROUNDS):
        logs, doing = play_round(model, tmp_path, store, seed)
        hits.update(doing)
        record = next((store / "versions" / NAME).glob("*.json"))
        truth.base = json.loads(record.read_bytes())["base_fingerprint"]
        truth.check(store, logs)
    print(f"\n{sum(hits.values())} kills of servers: {dict(hits)}; {truth.num_answers} answers kept")
    assert truth.num_answers >= 2 * NUM_ROUNDS, "too little was answered to say anything"


def play_round(model: ServedModel, root: Path, store: Path, seed: int) -> tuple[list[Path], list[str]]:
    """Two servers from start to death; logs of their clients, and what those waited for at the end."""
    chance = random.Random(seed)
    homes = [root / f"{seed}-{number}" for number in range(2)]
    for home in homes:
        shutil.copytree(model.adapters / "poet", home / "adapter")
    arguments = [str(model.base), "--store-dir", str(store), "--pool-bytes", "64M"]
    servers = [RunningServer(home, arguments) for home in homes]
    with ThreadPoolExecutor() as pool:
        list(pool.map(RunningServer.__enter__, servers))  # both start at once, on one store
    logs = [home / "log" for home in homes]
    clients = [
        Client(server.url, number, seed, homes[number] / "adapter", logs[number])
        for number, server in enumerate(servers)
    ]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    doing = []
    time.sleep(1 + chance.random())
    for server, client, thread in zip(servers, clients, threads, strict=True):
        time.sleep(chance.random())
        doing.append(client.doing)
        server.process.kill()
        server.process.wait()
        thread.join()
    return logs, doing
