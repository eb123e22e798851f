"""What a server does for its store by itself: times to live, retention, and what is dropped into a directory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from server.api import caretaker as caretaker_module
from server.api.caretaker import Caretaker
from server.front.front import Front
from tests.api.conftest import Door, Visit, safetensors_bytes

SQL = "/admin/v1/adapters/sql"


def make(door: Door, adapters_dir: Path | None = None) -> Caretaker:
    return Caretaker(cast(Front, door.front), door.service.audit, adapters_dir, 0.01)


def test_an_adapter_whose_time_is_over_is_deleted_and_the_log_says_why(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for name in ("sql", "poet", "pinned"):
            await door.upload(name, config=b'{"r": 4, "name": "%s"}' % name.encode())
            await door.client.post(f"/admin/v1/adapters/{name}/load")
        await door.client.patch(SQL, json={"ttl_s": 0.001})
        await door.client.patch("/admin/v1/adapters/poet", json={"ttl_s": 3600})
        await door.client.patch("/admin/v1/adapters/pinned", json={"ttl_s": 0.001, "pinned": True})
        await door.client.put(SQL + "/aliases/default/gate", json={"prompts": [{"inputs": "@early"}]})
        await asyncio.sleep(0.01)
        await make(door).expire()
        names = [one["name"] for one in (await door.client.get("/admin/v1/adapters")).json()["data"]]
        assert names == ["pinned", "poet"]
        line = (await door.client.get("/admin/v1/audit?adapter=sql&limit=1")).json()["data"][0]
        assert (line["actor"], line["action"], line["detail"]) == ("time to live", "adapter.delete", {"versions": [1]})
        assert {one.name for one in door.front.engine.loaded.values()} == {"pinned@1", "poet@1"}
        assert (await door.upload("sql")).status_code == 201, "its gate went with it"

    visit(test)


def test_versions_beyond_those_to_keep_are_pruned(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for rank in range(1, 6):
            await door.upload("sql", config=b'{"r": %d}' % rank)
        await door.client.put(SQL + "/aliases/old", json={"version": 1})
        await door.client.patch(SQL, json={"keep_versions": 2})
        await make(door).tend()
        left = [one["version"] for one in (await door.client.get(SQL)).json()["versions"]]
        assert left[0] == 1
        assert left == [1, 4, 5]
        line = (await door.client.get("/admin/v1/audit?adapter=sql&limit=1")).json()["data"][0]
        assert (line["actor"], line["action"]) == ("retention", "adapter.prune")
        assert line["detail"] == {"versions": [2, 3]}

    visit(test)


def test_what_a_commit_prunes_is_written_down_and_leaves_the_device(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql", config=b'{"r": 1}')
        await door.client.post(SQL + "/load")
        await door.client.patch(SQL, json={"keep_versions": 1})
        running = asyncio.create_task(make(door).run())
        await asyncio.sleep(0)
        assert (await door.upload("sql", config=b'{"r": 2}')).status_code == 201
        for _ in range(300):
            lines = (await door.client.get("/admin/v1/audit?adapter=sql")).json()["data"]
            if "adapter.prune" in [line["action"] for line in lines]:
                break
            await asyncio.sleep(0.01)
        assert [line["detail"]["versions"] for line in lines if line["action"] == "adapter.prune"] == [[1]]
        for _ in range(300):
            if not door.front.engine.loaded:
                break
            await asyncio.sleep(0.01)
        assert not door.front.engine.loaded
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    visit(test)


def test_it_works_by_itself_and_survives_trouble(visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "EXPIRE_EVERY_S", 0.01)
    dropped = tmp_path / "dropped"
    dropped.mkdir()

    async def test(door: Door) -> None:
        await door.upload("sql")
        upkeep: Any = door.front.library.catalog.upkeep
        expire, num_calls = upkeep.expire, 0

        def troubled() -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 1:
                raise OSError("the disk is away")
            return expire()

        upkeep.expire = troubled
        running = asyncio.create_task(make(door, dropped).run())
        await asyncio.sleep(0.1)
        await door.client.patch(SQL, json={"ttl_s": 0.001})
        (dropped / "poet").mkdir()
        (dropped / "poet" / "adapter_config.json").write_text('{"r": 4}')
        (dropped / "poet" / "adapter_model.safetensors").write_bytes(safetensors_bytes())
        for _ in range(300):
            names = [one["name"] for one in (await door.client.get("/admin/v1/adapters")).json()["data"]]
            if names == ["poet"]:
                break
            await asyncio.sleep(0.02)
        assert names == ["poet"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    visit(test)
