"""Aliases over HTTP: moves, weights, conditions and the way back."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.api.conftest import Door, Visit

SQL = "/admin/v1/adapters/sql"
PROD = SQL + "/aliases/prod"


async def upload_versions(door: Door, number: int, name: str = "sql") -> None:
    """Versions 1 to `number`; the bare name means the first."""
    for rank in range(1, number + 1):
        answer = await door.upload(name, config=b'{"r": %d}' % rank, promote=rank == 1)
        assert answer.json()["version"] == rank


async def version_of(door: Door, adapter: str, headers: dict[str, str] | None = None, **body: Any) -> int:
    answer = await door.client.post("/generate", json={"inputs": "a", "adapter": adapter, **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    return int(answer.headers["x-adapter-version"])


def test_an_alias_is_moved_and_shown_with_what_it_meant(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload_versions(door, 2)
        for version in (1, 2):
            moved = await door.client.put(PROD, json={"version": version})
            assert (moved.status_code, moved.json()["aliases"]["prod"]) == (200, version)
            assert await version_of(door, "sql@prod") == version
        shown = (await door.client.get(PROD)).json()
        assert (shown["weights"], shown["gated"]) == ({"2": 1}, False)
        assert [move["weights"] for move in shown["history"]] == [{"1": 1}]

    visit(test)


def test_equal_keys_get_the_same_version_and_keys_share_as_weighed(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload_versions(door, 2)
        moved = await door.client.put(PROD, json={"weights": {"1": 90, "2": 10}})
        assert moved.json()["aliases"]["prod"] == {"1": 90, "2": 10}
        first = [await version_of(door, "sql@prod", sticky_key=f"user-{n}") for n in range(200)]
        again = [await version_of(door, "sql@prod", headers={"x-sticky-key": f"user-{n}"}) for n in range(200)]
        assert first == again
        assert 5 <= Counter(first)[2] <= 40
        await door.client.put(PROD, json={"weights": {"1": 50, "2": 50}})
        later = [await version_of(door, "sql@prod", sticky_key=f"user-{n}") for n in range(200)]
        assert 70 <= Counter(later)[2] <= 130
        assert all(after == 2 for before, after in zip(first, later, strict=True) if before == 2), "nobody goes back"

    visit(test)


def test_without_a_key_each_request_is_assigned_by_chance(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload_versions(door, 2)
        await door.client.put(SQL + "/aliases/default", json={"weights": {"1": 1, "2": 1}})
        seen = Counter([await version_of(door, "sql") for _ in range(100)])
        assert 20 <= seen[1] <= 80
        assert seen.total() == 100

    visit(test)


def test_a_body_and_a_header_that_name_two_keys_are_refused(visit: Visit) -> None:
    async def test(door: Door) -> None:
        body = {"inputs": "a", "sticky_key": "a"}
        both = await door.client.post("/generate", json=body, headers={"x-sticky-key": "b"})
        assert (both.status_code, "differ" in both.json()["error"]) == (422, True)
        same = await door.client.post("/generate", json=body, headers={"x-sticky-key": "a"})
        assert same.status_code == 200
        long = await door.client.post("/generate", json={"inputs": "a"}, headers={"x-sticky-key": "b" * 301})
        assert long.status_code == 422

    visit(test)


def test_one_call_rolls_back(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload_versions(door, 3)
        for order in ({"version": 1}, {"weights": {"1": 9, "2": 1}}, {"version": 3}):
            await door.client.put(PROD, json=order)
        back = await door.client.post(PROD + "/rollback")
        assert (back.status_code, back.json()["aliases"]["prod"]) == (200, {"1": 9, "2": 1})
        assert (await door.client.post(PROD + "/rollback")).json()["aliases"]["prod"] == 1
        nothing = await door.client.post(PROD + "/rollback")
        assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "nothing_to_roll_back")

    visit(test)


def test_a_rollback_reaches_the_bare_name_after_an_upload(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        await door.upload("sql", config=b'{"r": 8}')
        assert await version_of(door, "sql") == 2
        await door.client.post(SQL + "/aliases/default/rollback")
        assert await version_of(door, "sql") == 1

    visit(test)


def test_a_move_on_a_condition_that_no_longer_holds_changes_nothing(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload_versions(door, 2)
        seen = (await door.client.get(SQL)).headers["etag"]
        first = await door.client.put(PROD, json={"version": 1}, headers={"If-Match": seen})
        assert first.status_code == 200
        late = await door.client.put(PROD, json={"version": 2}, headers={"If-Match": seen})
        assert (late.status_code, late.json()["error"]["code"]) == (412, "precondition_failed")
        assert await version_of(door, "sql@prod") == 1
        for method, path in (("DELETE", ""), ("POST", "/rollback")):
            answer = await door.client.request(method, PROD + path, headers={"If-Match": seen})
            assert answer.status_code == 412
        fresh = {"If-Match": first.headers["etag"]}
        assert (await door.client.put(PROD, json={"version": 2}, headers=fresh)).status_code == 200

    visit(test)


def test_of_many_moves_on_one_condition_one_wins(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload_versions(door, 4)
        seen = {"If-Match": (await door.client.get(SQL)).headers["etag"]}

        async def move(version: int) -> httpx.Response:
            return await door.client.put(PROD, json={"version": version}, headers=seen)

        answers = await asyncio.gather(*(move(version) for version in (1, 2, 3, 4)))
        assert Counter(answer.status_code for answer in answers) == {200: 1, 412: 3}

    visit(test)


def test_an_alias_is_forgotten_and_its_versions_stay(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload_versions(door, 1)
        await door.client.put(PROD, json={"version": 1})
        assert (await door.client.delete(PROD)).status_code == 204
        gone = await door.client.get(PROD)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "alias_not_found")
        assert (await door.client.post("/generate", json={"inputs": "a", "adapter": "sql@prod"})).status_code == 404
        assert await version_of(door, "sql@1") == 1

    visit(test)


@pytest.mark.parametrize(
    ("order", "status", "code"),
    [
        ({}, 422, "validation"),
        ({"version": 1, "weights": {"1": 1}}, 422, "validation"),
        ({"weights": {}}, 422, "invalid_weights"),
        ({"weights": {"1": 0}}, 422, "invalid_weights"),
        ({"weights": {"1": -1, "2": 3}}, 422, "invalid_weights"),
        ({"weights": {"1": 10001}}, 422, "invalid_weights"),
        ({"weights": {"x": 1}}, 422, "validation"),
        ({"weights": {"²": 1}}, 422, "validation"),
        ({"weights": {"1": 1.5}}, 422, "validation"),
        ({"weights": {"1": 1, "9": 1}}, 404, "version_not_found"),
        ({"version": 9}, 404, "version_not_found"),
        ({"version": 1, "force": True}, 422, "validation"),
    ],
)
def test_orders_that_mean_nothing_are_refused(visit: Visit, order: dict[str, Any], status: int, code: str) -> None:
    async def test(door: Door) -> None:
        await upload_versions(door, 1)
        answer = await door.client.put(PROD, json=order)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert (await door.client.get(SQL)).json()["aliases"] == {"default": 1}

    visit(test)


def test_every_move_is_in_the_audit_log_with_before_and_after(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload_versions(door, 2)
        await door.client.put(PROD, json={"version": 1})
        await door.client.put(PROD, json={"weights": {"1": 3, "2": 1}})
        await door.client.post(PROD + "/rollback")
        await door.client.delete(PROD)
        lines = (await door.client.get("/admin/v1/audit?adapter=sql&limit=4")).json()["data"]
        told = [(line["action"], line["target"], line["detail"]) for line in reversed(lines)]
        assert told == [
            ("alias.set", "sql@prod", {"before": None, "after": {"1": 1}}),
            ("alias.set", "sql@prod", {"before": {"1": 1}, "after": {"1": 3, "2": 1}}),
            ("alias.rollback", "sql@prod", {"before": {"1": 3, "2": 1}, "after": {"1": 1}}),
            ("alias.delete", "sql@prod", {"before": {"1": 1}}),
        ]

    visit(test)
