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


def test_what_was_done_before_a_failure_is_written(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for rank in (1, 2):
            await door.upload("sql", config=b'{"r": %d}' % rank)
            await door.client.post("/admin/v1/adapters/sql/load", json={"version": rank})
        record = door.front.library.catalog.record("sql")
        door.front.engine.busy.add(record.versions[1].content.effect_digest)
        assert (await door.client.post("/admin/v1/adapters/sql/unload")).status_code == 409
        entry = (await lines(door, "?limit=1"))[0]
        assert (entry["action"], entry["target"]) == ("adapter.unload", "sql")
        assert entry["detail"] == {"tier": "device", "evicted": ["sql@1 from device"], "failed": "adapter_in_use"}
        assert (await door.client.post("/admin/v1/adapters/sql/unload")).status_code == 409
        assert (await lines(door, "?limit=1")) == [entry], "the control: what changed nothing leaves no line"

    visit(test)


def test_a_version_that_its_gate_kept_from_an_alias_is_written(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        gate = {"prompts": [{"inputs": "a", "contains": ["never"]}]}
        await door.client.put("/admin/v1/adapters/sql/aliases/default/gate", json=gate)
        answer = await door.upload("sql", config=b'{"r": 8}')
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "gate_failed")
        entry = (await lines(door, "?limit=1"))[0]
        assert (entry["action"], entry["target"]) == ("adapter.upload", "sql@2")
        assert (entry["detail"]["created"], entry["detail"]["failed"]) == (True, "gate_failed")

    visit(test)


def test_work_in_the_background_that_fails_after_a_change_is_written(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def half(running: Operation) -> dict[str, Any]:
            running.note(version=3)
            raise OSError("no")

        assert await door.service.operations.start("adapter.register", "sql", half, actor="API key 1").wait(5)
        (entry,) = await lines(door)
        assert (entry["action"], entry["detail"]["version"], entry["detail"]["failed"]) == (
            "adapter.register",
            3,
            "internal",
        )

    visit(test)


def test_every_action_is_a_thing_and_what_was_done_to_it(visit: Visit) -> None:
    async def test(door: Door) -> None:
        base, alias = "/admin/v1/adapters/sql", "/admin/v1/adapters/sql/aliases/prod"
        for rank in (1, 2):
            await door.upload("sql", config=b'{"r": %d}' % rank, alias="prod")
        changes: list[tuple[str, str, Any]] = [
            ("PATCH", base, {"description": "x"}),
            ("POST", base + "/load", {}),
            ("POST", base + "/unload", {}),
            ("POST", base + "/load", {"wait": False}),
            ("PUT", alias, {"version": 1}),
            ("POST", alias + "/rollback", None),
            ("PUT", alias + "/gate", {"prompts": [{"inputs": "a"}]}),
            ("POST", alias + "/canary?skip_gate=true", {"version": 1}),
            ("DELETE", alias + "/canary", None),
            ("DELETE", alias + "/gate", None),
            ("DELETE", alias, None),
            ("POST", "/admin/v1/cache/evict", {"count": 1}),
            ("DELETE", base, None),
        ]
        for method, path, body in changes:
            answer = await door.client.request(method, path, json=body)
            assert answer.status_code < 300, (path, answer.text)
            for operation in door.service.operations.all():
                assert await operation.wait(5)
        said = [entry["action"] for entry in reversed(await lines(door))]
        assert said == [
            *("adapter.upload", "adapter.upload", "adapter.change", "adapter.load", "adapter.unload", "adapter.load"),
            *("alias.set", "alias.rollback", "gate.set", "canary.start", "canary.stop", "gate.delete", "alias.delete"),
            *("cache.evict", "adapter.delete"),
        ]

    visit(test)
