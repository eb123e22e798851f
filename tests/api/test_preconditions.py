"""`If-Match` on every change: honoured, or refused; never passed over."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from server.api.app import ROUTERS
from server.api.guarded_route import GuardedRoute
from tests.api.conftest import Door, Visit

SQL = "/admin/v1/adapters/sql"
GATE = {"prompts": [{"inputs": "a"}]}
HONOURED: list[tuple[str, str, dict[str, Any]]] = [
    ("PATCH", SQL, {"json": {"description": "x"}}),
    ("DELETE", SQL, {}),
    ("DELETE", SQL + "/versions/1", {}),
    ("PUT", SQL + "/aliases/prod", {"json": {"version": 1}}),
    ("POST", SQL + "/aliases/prod/rollback", {}),
    ("DELETE", SQL + "/aliases/prod", {}),
    ("POST", SQL + "/aliases/prod/canary", {"json": {"version": 1}}),
    ("DELETE", SQL + "/aliases/default/canary", {}),
    ("PUT", SQL + "/aliases/prod/gate", {"json": GATE}),
    ("DELETE", SQL + "/aliases/default/gate", {}),
    ("PUT", SQL, {"content": b"x"}),
    ("POST", "/admin/v1/adapters", {"json": {"name": "sql", "source": {"uri": "org/sql"}}}),
]
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", SQL + "/load", {}),
    ("POST", SQL + "/unload", {}),
    ("POST", SQL + "/aliases/default/gate/check?version=1", {}),
    ("POST", "/admin/v1/cache/evict", {"json": {"count": 1}}),
    ("PUT", "/admin/v1/blobs/sha256:" + "0" * 64, {"content": b"x"}),
    ("POST", "/admin/v1/blobs/sha256:" + "0" * 64, {"content": b"x"}),
    ("DELETE", "/admin/v1/operations/op_1", {}),
    ("POST", "/v1/load_lora_adapter", {"json": {}}),
    ("POST", "/v1/unload_lora_adapter", {"json": {}}),
]


async def prepare(door: Door) -> str:
    """An adapter with a canary and a gate; its tag."""
    for rank in (1, 2):
        await door.upload("sql", config=b'{"r": %d}' % rank)
    await door.client.put(SQL + "/aliases/prod", json={"version": 1})
    await door.client.put(SQL + "/aliases/prod", json={"version": 2})
    await door.client.put(SQL + "/aliases/default/gate", json=GATE)
    started = await door.client.post(SQL + "/aliases/default/canary?skip_gate=true", json={"version": 1})
    assert started.status_code == 201
    return (await door.client.get(SQL)).headers["etag"]


async def everything(door: Door) -> list[Any]:
    places = (SQL, SQL + "/aliases/default/gate", SQL + "/aliases/default/canary", SQL + "/aliases/prod/gate")
    return [(await door.client.get(place)).json() for place in places]


async def ask(door: Door, change: tuple[str, str, dict[str, Any]], **headers: str) -> httpx.Response:
    method, path, options = change
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return await door.client.request(method, path, headers=given, **options)


@pytest.mark.parametrize("change", HONOURED, ids=lambda change: f"{change[0]} {change[1]}")
def test_a_stale_tag_stops_the_change(visit: Visit, change: tuple[str, str, dict[str, Any]]) -> None:
    async def test(door: Door) -> None:
        tag = await prepare(door)
        before = await everything(door)
        stale = await ask(door, change, if_match='"stale"')
        assert (stale.status_code, stale.json()["error"]["code"]) == (412, "precondition_failed")
        timed = await ask(door, change, if_unmodified_since="Wed, 25 Nov 2026 05:00:00 GMT")
        assert (timed.status_code, timed.json()["error"]["code"]) == (400, "precondition_unsupported")
        assert await everything(door) == before
        assert (await ask(door, change, if_match=tag)).status_code != 412, "the control: with the tag that it has"

    visit(test)


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: f"{change[0]} {change[1]}")
def test_what_changes_no_adapter_takes_no_tag(visit: Visit, change: tuple[str, str, dict[str, Any]]) -> None:
    async def test(door: Door) -> None:
        await prepare(door)
        for header in ("if_match", "if_none_match"):
            answer = await ask(door, change, **{header: "*"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "precondition_unsupported")

    visit(test, allow_runtime_lora_updating=True)


def test_every_change_is_in_one_of_the_two_lists() -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    missing = {
        (method, route.path)
        for route in routes
        if isinstance(route, GuardedRoute) and getattr(route.endpoint, "veneer_access", "") == "admin"
        for method in (route.methods or set()) - {"GET", "HEAD"}
        if not any(
            method == listed and re.fullmatch(route.path_regex, path.partition("?")[0])
            for listed, path, _ in (*HONOURED, *REFUSED)
        )
    }
    assert missing == set()
