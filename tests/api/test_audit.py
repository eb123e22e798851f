"""The audit log: every change of every admin route leaves a line with who made it, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute
from pydantic import SecretStr

from adapters_store.backup import backup, restore
from server.api.app import ROUTERS
from server.api.guarded_route import GuardedRoute
from server.api.operation import Operation
from tests.api.conftest import Door, Visit

AUDIT = "/admin/v1/audit"
BOSS = {"Authorization": "Bearer boss-key"}


async def lines(door: Door, query: str = "", **options: Any) -> list[dict[str, Any]]:
    answer = await door.client.get(AUDIT + query, **options)
    assert answer.status_code == 200
    return list(answer.json()["data"])


def test_a_change_is_written_with_who_made_it_and_never_with_a_key(visit: Visit) -> None:
    async def test(door: Door) -> None:
        headers = {**BOSS, "X-Request-Id": "deploy-7"}
        answer = await door.client.post("/admin/v1/adapters", files=door.parts("pirate"), headers=headers)
        assert answer.status_code == 201
        (entry,) = await lines(door, headers=BOSS)
        assert (entry["actor"], entry["target"], entry["request_id"]) == ("admin key 2", "pirate@1", "deploy-7")
        on_disk = (door.root / "audit.jsonl").read_text()
        assert json.loads(on_disk)["actor"] == "admin key 2"
        assert "boss-key" not in on_disk

    visit(test, admin_api_key=[SecretStr("other"), SecretStr("boss-key")])


def test_looking_refusals_and_denials_leave_no_line(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.client.get("/admin/v1/adapters")
        await door.client.delete("/admin/v1/adapters/nobody")
        await door.client.post("/admin/v1/adapters", files=door.parts("a,b"))
        await door.client.post("/admin/v1/adapters?dry_run=true", files=door.parts("pirate"))
        await door.generate()
        assert await lines(door) == []

    visit(test)


def test_the_youngest_line_comes_first_and_lines_are_told_by_adapter(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for name in ("a", "ab", "a"):
            await door.upload(name)
        await door.client.delete("/admin/v1/adapters/a")
        everything = await lines(door)
        assert [entry["target"] for entry in everything] == ["a", "a@1", "ab@1", "a@1"]
        assert [entry["target"] for entry in await lines(door, "?adapter=ab")] == ["ab@1"]
        assert [entry["target"] for entry in await lines(door, "?limit=1")] == ["a"]

    visit(test)


def test_what_ends_in_the_background_is_written_when_it_ends(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def good(running: Operation) -> dict[str, Any]:
            return {"version": 3}

        async def bad(running: Operation) -> dict[str, Any]:
            raise OSError("no")

        for work in (good, bad):
            assert await door.service.operations.start("adapter.register", "sql", work, actor="API key 1").wait(5)
        (entry,) = await lines(door)
        assert (entry["actor"], entry["action"], entry["target"]) == ("API key 1", "adapter.register", "sql")
        assert entry["detail"]["version"] == 3

    visit(test)


def test_every_admin_route_that_changes_something_passes_the_writer() -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    changing = [route for route in routes if route.path.startswith("/admin/") and (route.methods or set()) - {"GET"}]
    assert len(changing) > 5
    assert [route.path for route in changing if not isinstance(route, GuardedRoute)] == []
    assert [route.path for route in changing if getattr(route.endpoint, "veneer_access", "") != "admin"] == []


def test_a_backup_holds_the_log_and_the_gates(visit: Visit, tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        gate = {"prompts": [{"inputs": "a"}]}
        await door.client.put("/admin/v1/adapters/sql/aliases/default/gate", json=gate)

    visit(test)
    backup(tmp_path / "store", tmp_path / "store.tar")
    restore(tmp_path / "store.tar", tmp_path / "again")
    for name in ("audit.jsonl", "rules/sql/default.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "store" / name).read_bytes()
