"""`POST /admin/v1/adapters` with a JSON body: the server fetches, an operation says how far it is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.keys import KeyRecord, add_key, digest_of
from server.library.sources.policy import SourcePolicy
from server.library.sources.puller import Puller
from tests.api.conftest import Door, Visit
from tests.library.loopback_hub import LoopbackHub, Repo
from tests.library.source_samples import KEPT, adapter_files

PATH = "/admin/v1/adapters"
SMALL = 500_000


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with LoopbackHub({"org/sql": Repo(adapter_files(num_bytes=SMALL))}) as running:
        yield running


def aim(door: Door, hub: LoopbackHub, **policy: Any) -> None:
    door.front.puller = Puller(door.front.library, SourcePolicy(hub_endpoint=hub.url, **policy))


async def order(door: Door, query: str = "?wait=30", **body: Any) -> httpx.Response:
    given = {"name": "sql", "source": {"uri": "org/sql@v2"}} | body
    return await door.client.post(PATH + query, json=given)


def code_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def test_an_order_is_an_operation_that_ends_in_a_version(visit: Visit, hub: LoopbackHub) -> None:
    async def test(door: Door) -> None:
        aim(door, hub)
        answer = await order(door, "")
        assert (answer.status_code, answer.headers["retry-after"]) == (202, "1")
        assert (answer.json()["kind"], answer.json()["target"]) == ("adapter.register", "sql")
        ended = (await door.client.get(answer.headers["location"] + "?wait=30")).json()
        assert (ended["status"], ended["error"]) == ("succeeded", None)
        version = ended["result"]
        assert version["source"] == {"uri": "hf://org/sql", "revision": hub.repos["org/sql"].commit}
        assert ended["progress"]["total"] == ended["progress"]["completed"] == version["bytes"]
        assert [file["path"] for file in version["files"]] == KEPT
        assert (await door.generate(adapter="sql")).status_code == 200
        assert door.leftovers() == []
        entries = (await door.client.get("/admin/v1/audit")).json()["data"]
        assert [(entry["action"], entry["target"]) for entry in entries] == [("adapter.register", "sql")]

    visit(test)


def test_waiting_gives_the_version_itself(visit: Visit, hub: LoopbackHub) -> None:
    async def test(door: Door) -> None:
        aim(door, hub)
        first, again = await order(door, alias="prod"), await order(door)
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.json()["version"] == again.json()["version"] == 1
        assert first.headers["location"] == "/admin/v1/adapters/sql/versions/1"
        shown = (await door.client.get(PATH + "/sql")).json()
        assert set(shown["aliases"]) == {"default", "prod"}

    visit(test)


def test_labels_pins_and_tiers_are_honoured(visit: Visit, hub: LoopbackHub) -> None:
    async def test(door: Door) -> None:
        aim(door, hub)
        answer = await order(door, labels={"team": "bi"}, pinned=True, preload="gpu", promote=True)
        assert answer.status_code == 201
        known = door.front.library.catalog.record("sql").attributes
        assert (known.labels, known.pinned) == ({"team": "bi"}, True)
        assert answer.json()["residency"]["device"]["state"] == "ready"
        await order(door, labels={"stage": "dev"})
        assert door.front.library.catalog.record("sql").attributes.labels == {"team": "bi", "stage": "dev"}
        assert door.front.library.catalog.record("sql").attributes.pinned

    visit(test)


def test_a_dry_run_keeps_nothing(visit: Visit, hub: LoopbackHub) -> None:
    async def test(door: Door) -> None:
        aim(door, hub)
        answer = await order(door, "?dry_run=true&wait=30")
        assert (answer.status_code, answer.json()["object"]) == (200, "adapter.check")
        assert (await door.client.get(PATH)).json()["data"] == []
        assert door.leftovers() == []
        assert (await door.client.get("/admin/v1/audit")).json()["data"] == []

    visit(test)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"source": {"uri": "no source"}}, 422, "invalid_source"),
        ({"source": {"uri": "http://h.example/a/"}}, 422, "invalid_source"),
        ({"source": {"uri": "https://u:p@h.example/a/"}}, 422, "invalid_source"),
        ({"source": {"uri": "s3://bucket/a", "token": "x"}}, 422, "invalid_source"),
        ({"source": {"uri": "org/sql", "token": "a b"}}, 422, "invalid_source"),
        ({"source": {"uri": "/etc"}}, 403, "source_not_allowed"),
        ({"source": {"uri": "file:///etc"}}, 403, "source_not_allowed"),
        ({"source": {"uri": "https://h.example/a/"}}, 403, "source_not_allowed"),
        ({"source": {"uri": "https://169.254.169.254/a/"}}, 403, "source_not_allowed"),
        ({"source": {"uri": "org/nobody"}}, 404, "source_not_found"),
        ({"source": {"uri": "org/sql@v9"}}, 404, "source_not_found"),
        ({"source": {"files": {}}}, 422, "invalid_order"),
        ({"source": "org/sql"}, 422, "invalid_order"),
        ({"name": "../x"}, 422, "invalid_name"),
        ({"alias": "v3"}, 422, "invalid_name"),
        ({"if_exists": "replace_if_same"}, 422, "invalid_order"),
        ({"preload": "tpu"}, 422, "invalid_order"),
        ({"pinned": "yes"}, 422, "invalid_order"),
        ({"labels": {"bad key": "x"}}, 422, "invalid_attribute"),
        ({"unknown": 1}, 422, "invalid_order"),
    ],
)
def test_refusals_have_their_codes_and_leave_nothing(
    visit: Visit, hub: LoopbackHub, body: dict[str, Any], status: int, code: str
) -> None:
    async def test(door: Door) -> None:
        aim(door, hub)
        answer = await order(door, **body)
        assert (answer.status_code, code_of(answer)) == (status, code)
        assert door.leftovers() == []
        assert (await door.client.get(PATH)).json()["data"] == []

    visit(test)


def test_failures_of_the_source_are_the_answer_of_who_waits(visit: Visit, hub: LoopbackHub) -> None:
    async def test(door: Door) -> None:
        aim(door, hub)
        hub.repos["org/sql"].is_gated = True
        answer = await order(door, source={"uri": "org/sql", "token": "hf_secret"})
        assert (answer.status_code, code_of(answer)) == (424, "source_denied")
        hub.status = 503
        answer = await order(door)
        assert (answer.status_code, code_of(answer)) == (503, "source_unavailable")
        listed = await door.client.get("/admin/v1/operations")
        assert [operation["status"] for operation in listed.json()["data"]] == ["failed", "failed"]
        assert "hf_secret" not in listed.text

    visit(test)


def test_preconditions_and_existing_adapters(visit: Visit, hub: LoopbackHub) -> None:
    async def test(door: Door) -> None:
        aim(door, hub)
        await order(door)
        hub.asked.clear()
        body = {"name": "sql", "source": {"uri": "org/sql"}}
        answer = await door.client.post(PATH + "?wait=9", json=body, headers={"If-None-Match": "*"})
        assert (answer.status_code, code_of(answer)) == (412, "precondition_failed")
        assert hub.asked == []  # known without asking anybody
        hub.repos["org/sql"].files = adapter_files(rank=8)
        for query in ("?wait=30", "", "?dry_run=true&wait=30"):
            answer = await order(door, query, if_exists="error")
            assert (answer.status_code, code_of(answer)) == (409, "adapter_exists")
        assert hub.asked == []

    visit(test)


def test_a_cancelled_operation_leaves_nothing(visit: Visit, hub: LoopbackHub) -> None:
    hub.stall = threading.Event()

    async def test(door: Door) -> None:
        aim(door, hub)
        location = (await order(door, "")).headers["location"]
        for _ in range(500):
            if (await door.client.get(location)).json()["progress"]["total"] is not None:
                break
            await asyncio.sleep(0.01)
        gone = await door.client.delete(location)
        assert gone.json()["status"] == "cancelled"
        assert hub.stall is not None
        hub.stall.set()
        for _ in range(200):
            if not door.leftovers():
                break
            await asyncio.sleep(0.02)
        assert door.leftovers() == []
        assert (await door.client.get(PATH)).json()["data"] == []

    visit(test)


def test_a_body_that_is_no_order(visit: Visit, hub: LoopbackHub) -> None:
    async def test(door: Door) -> None:
        aim(door, hub)
        for content, status in ((b"{", 422), (b"[]", 422), (b"{" + b" " * 70_000, 413)):
            answer = await door.client.post(PATH, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == status
        answer = await order(door, "?dryrun=true")
        assert answer.status_code == 422

    visit(test)


def test_a_key_that_is_bound_to_adapters_has_nothing_of_the_servers_own(
    visit: Visit, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_server")
    local = tmp_path / "adapters" / "sql"
    local.mkdir(parents=True)
    for name, content in adapter_files().items():
        (local / name).write_bytes(content)
    for name, adapters in (("bound", ("bi/*",)), ("free", ("*",))):
        record = KeyRecord(
            name=name, sha256=digest_of(name), scopes=("admin",), adapters=adapters, created_at=datetime.now(UTC)
        )
        add_key(tmp_path / "keys.json", record)

    async def test(door: Door) -> None:
        aim(door, hub, roots=(tmp_path / "adapters",))

        async def ask(key: str, uri: str, name: str = "bi/sql") -> httpx.Response:
            body = {"name": name, "source": {"uri": uri}}
            return await door.client.post(PATH + "?wait=9", json=body, headers={"Authorization": f"Bearer {key}"})

        for uri in (str(local), "s3://bucket/sql", "gs://bucket/sql"):
            answer = await ask("bound", uri)
            assert (answer.status_code, code_of(answer)) == (403, "source_not_allowed")
        assert (await ask("bound", "org/sql", "other")).status_code == 404
        assert hub.asked == []
        assert (await ask("bound", "org/sql")).status_code == 201
        assert {asked.token for asked in hub.asked} == {None}
        hub.asked.clear()
        assert (await ask("free", "org/sql")).status_code == 200
        assert "Bearer hf_of_the_server" in {asked.token for asked in hub.asked}
        assert (await ask("free", str(local), "local")).status_code == 201

    visit(test, keys_file=tmp_path / "keys.json")
