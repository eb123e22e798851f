"""A server that fetches adapters: by an admin's order, by a path, and because a request named one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients.running import RunningServer
from tests.clients.served_model import ServedModel
from tests.library.loopback_hub import LoopbackHub, Repo

ADMIN = "/admin/v1/adapters"


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def hub(model: ServedModel) -> Iterator[LoopbackHub]:
    guest, sql = files_of(model.guest), files_of(model.adapters / "sql")
    repos = {"org/guest": Repo(guest), "org/sql": Repo(sql, commit="5" * 40), "other/guest": Repo(guest)}
    with LoopbackHub({**repos, "org/private": Repo(guest, token="hf_right")}) as running:
        yield running


@pytest.fixture(scope="module")
def fetching(model: ServedModel, hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("fetching")
    flags = ["--hub-endpoint", hub.url, "--adapter-auto-load", "org/*", "--adapter-roots", str(model.adapters)]
    arguments = [str(model.base), "--store-dir", str(root / "store"), "--pool-bytes", "64M", *flags]
    arguments += ["--lora-modules", "started=hf://org/sql", "gone=org/nothing"]
    with RunningServer(root, arguments, HF_TOKEN="", HF_HUB_OFFLINE="", HF_HOME=str(root)) as running:
        yield running


def generate(server: RunningServer, adapter: str) -> httpx.Response:
    body = {"inputs": "abc", "adapter": adapter, "parameters": {"max_new_tokens": 8}}
    return httpx.post(server.url + "/generate", json=body, timeout=60)


def pull(server: RunningServer, name: str, uri: str, **source: str) -> httpx.Response:
    body = {"name": name, "source": {"uri": uri, **source}}
    return httpx.post(server.url + ADMIN + "?wait=60", json=body, timeout=90)


def test_a_request_brings_in_the_adapter_that_it_names(fetching: RunningServer, hub: LoopbackHub) -> None:
    answer = generate(fetching, "org/guest")
    assert (answer.status_code, answer.headers["x-adapter-id"]) == (200, "org/guest")
    version = httpx.get(fetching.url + ADMIN + "/org/guest/versions/1").json()
    assert version["source"] == {"uri": "hf://org/guest", "revision": hub.repos["org/guest"].commit}
    assert answer.json()["generated_text"] != generate(fetching, "org/sql").json()["generated_text"]


def test_and_no_other(fetching: RunningServer) -> None:
    for name in ("other/guest", "org/nothing", "org/private"):
        answer = generate(fetching, name)
        assert (answer.status_code, answer.json()["error_type"]) == (404, "adapter_not_found")


def test_a_module_may_be_a_source(fetching: RunningServer) -> None:
    version = httpx.get(fetching.url + ADMIN + "/started/versions/1").json()
    assert version["source"] == {"uri": "hf://org/sql", "revision": "5" * 40}
    assert "adapter 'gone' cannot be fetched from org/nothing" in fetching.output


def test_an_order_by_path_and_by_hub_give_the_same_content(fetching: RunningServer, model: ServedModel) -> None:
    by_path = pull(fetching, "local-sql", str(model.adapters / "sql"))
    by_hub = pull(fetching, "hub-sql", f"org/sql@{'5' * 40}")
    assert (by_path.status_code, by_hub.status_code) == (201, 201)
    assert by_path.json()["digest"] == by_hub.json()["digest"]
    texts = {generate(fetching, name).json()["generated_text"] for name in ("local-sql", "hub-sql", "org/sql")}
    assert len(texts) == 1


def test_a_private_adapter_takes_the_orders_own_token_which_is_not_logged(fetching: RunningServer) -> None:
    assert pull(fetching, "private", "org/private").status_code == 404
    assert pull(fetching, "private", "org/private", token="hf_right").status_code == 201
    assert "hf_right" not in fetching.output


def test_nothing_of_the_machine_is_read_beyond_the_roots(fetching: RunningServer, model: ServedModel) -> None:
    for uri in (str(model.guest), "/etc", "file:///root", "https://localhost/a/", "https://169.254.169.254/a/"):
        answer = pull(fetching, "leak", uri)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "source_not_allowed")
