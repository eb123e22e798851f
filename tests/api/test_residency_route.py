"""Bringing adapters near and sending them away, pins, labels, time to live, and how an adapter's requests fared."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from server.engine.request import AdapterState, ResidentAdapter
from tests.api.conftest import Door, Visit

SQL = "/admin/v1/adapters/sql"
CACHE = "/admin/v1/cache"


def resident(name: str, num_bytes: int, idle_s: float, **facts: Any) -> ResidentAdapter:
    return ResidentAdapter(
        name, name, AdapterState.DEVICE, num_bytes, 1, facts.pop("num_pins", 0), 0.0, idle_s=idle_s, **facts
    )


def fill(door: Door) -> None:
    there = [
        resident("idle@1", 10, 90.0),
        resident("used@1", 20, 99.0, num_pins=1),
        resident("kept@1", 40, 99.0, is_kept=True),
        resident("fresh@1", 80, 1.0),
        resident("older@1", 160, 50.0),
    ]
    door.front.engine.loaded = {one.key: one for one in there}


def test_an_adapter_is_loaded_in_the_background(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        answer = await door.client.post(SQL + "/load", json={"tier": "gpu", "wait": False})
        assert (answer.status_code, answer.headers["retry-after"]) == (202, "1")
        ended = (await door.client.get(answer.headers["location"] + "?wait=10")).json()
        assert (ended["status"], ended["kind"], ended["target"]) == ("succeeded", "adapter.load", "sql@1")
        assert ended["result"]["residency"]["device"]["state"] == "ready"

    visit(test)


def test_a_load_in_the_background_that_fails_says_why(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("broken")
        answer = await door.client.post("/admin/v1/adapters/broken/load", json={"wait": False})
        ended = (await door.client.get(answer.headers["location"] + "?wait=10")).json()
        assert (ended["status"], "cut short" in ended["error"]["message"]) == ("failed", True)

    visit(test)


@pytest.mark.parametrize(
    ("tier", "expected"), [("device", "device"), ("gpu", "device"), ("cpu", "host"), ("host", "host")]
)
def test_tiers_have_two_names_each(visit: Visit, tier: str, expected: str) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        assert (await door.client.post(SQL + "/load", json={"tier": tier})).status_code == 200
        assert (await door.client.post(SQL + "/unload", json={"tier": tier})).status_code == 200
        assert door.front.engine.tiers == [expected, expected]
        wrong = await door.client.post(SQL + "/load", json={"tier": "disk"})
        assert wrong.status_code == 422

    visit(test)


def test_unloading_from_everywhere_asks_both_tiers(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        await door.client.post(SQL + "/unload", json={"tier": "all", "version": 1})
        assert door.front.engine.tiers == ["device", "host"]
        assert (await door.client.post(SQL + "/unload", json={"version": 7})).status_code == 404

    visit(test)


def test_the_cache_view_tells_tiers_and_who_is_there(visit: Visit) -> None:
    async def test(door: Door) -> None:
        fill(door)
        view = (await door.client.get(CACHE)).json()
        assert view["tiers"] == {"device": 310, "host": 0}
        kept = next(one for one in view["residents"] if one["adapter"] == "kept@1")
        assert (kept["pinned"], kept["idle_s"], kept["bytes"]) == (True, 99.0, 40)

    visit(test)


@pytest.mark.parametrize(
    ("order", "evicted", "left"),
    [
        ({"count": 1}, ["idle@1"], 300),
        ({"count": 2}, ["idle@1", "older@1"], 140),
        ({"count": 9}, ["idle@1", "older@1", "fresh@1"], 60),
        ({"target_bytes": 305}, ["idle@1"], 300),
        ({"target_bytes": 200}, ["idle@1", "older@1"], 140),
        ({"target_bytes": 0}, ["idle@1", "older@1", "fresh@1"], 60),
        ({"target_bytes": 10**9}, [], 310),
    ],
)
def test_the_idlest_go_first_and_what_is_used_or_pinned_stays(
    visit: Visit, order: dict[str, int], evicted: list[str], left: int
) -> None:
    async def test(door: Door) -> None:
        fill(door)
        answer = (await door.client.post(CACHE + "/evict", json=order)).json()
        assert (answer["evicted"], answer["bytes_left"], answer["bytes"]) == (evicted, left, 310 - left)

    visit(test)


def test_an_eviction_needs_one_measure(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for order in ({}, {"count": 1, "target_bytes": 1}, {"count": 0}, {"tier": "disk", "count": 1}):
            assert (await door.client.post(CACHE + "/evict", json=order)).status_code == 422

    visit(test)


def test_a_pin_keeps_what_the_name_means_and_follows_it(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        pinned = await door.client.patch(SQL, json={"pinned": True})
        assert (pinned.status_code, pinned.json()["pinned"]) == (200, True)
        assert door.front.engine.kept == ["sql@1"]
        await door.upload("sql", config=b'{"r": 8}')
        assert door.front.engine.kept == ["sql@2"], "an upload moved the name"
        await door.client.post(SQL + "/aliases/default/rollback")
        assert door.front.engine.kept == ["sql@1"]
        await door.client.put(SQL + "/aliases/default", json={"weights": {"1": 1, "2": 1}})
        assert door.front.engine.kept == ["sql@1", "sql@2"]
        await door.client.patch(SQL, json={"pinned": False, "pinned_versions": [2]})
        assert door.front.engine.kept == ["sql@2"]
        await door.client.delete(SQL + "?force=true")
        assert door.front.engine.kept == []

    visit(test)


def test_a_pin_that_finds_no_room_is_refused_and_leaves_no_trace(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("huge")
        answer = await door.client.patch("/admin/v1/adapters/huge", json={"pinned": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_room")
        assert (await door.client.get("/admin/v1/adapters/huge")).json()["pinned"] is False
        missing = await door.client.patch("/admin/v1/adapters/huge", json={"pinned_versions": [4]})
        assert missing.json()["error"]["code"] == "version_not_found"

    visit(test)


def test_pins_of_an_earlier_life_are_kept_again(visit: Visit) -> None:
    async def first(door: Door) -> None:
        await door.upload("sql")
        await door.client.patch(SQL, json={"pinned": True})

    async def second(door: Door) -> None:
        for _ in range(100):
            if door.front.engine.kept:
                break
            await asyncio.sleep(0.02)
        assert door.front.engine.kept == ["sql@1"]

    visit(first)
    visit(second)


def test_labels_are_merged_and_null_takes_away(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        await door.client.patch(SQL, json={"labels": {"team": "bi", "old": "x"}, "description": "Speaks SQL."})
        shown = (await door.client.patch(SQL, json={"labels": {"old": None, "tier": "gold"}})).json()
        assert (shown["labels"], shown["description"]) == ({"team": "bi", "tier": "gold"}, "Speaks SQL.")
        assert (await door.client.get(SQL)).json() == shown
        for wrong in ({"labels": {"": "x"}}, {"labels": {"a": "x" * 300}}, {"keep_versions": 0}, {"colour": "red"}):
            assert (await door.client.patch(SQL, json=wrong)).status_code == 422
        assert (await door.client.patch("/admin/v1/adapters/nobody", json={})).status_code == 404

    visit(test)


def test_a_time_to_live_becomes_a_date(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        shown = (await door.client.patch(SQL, json={"ttl_s": 3600})).json()
        left_s = (datetime.fromisoformat(shown["expires_at"]) - datetime.now(UTC)).total_seconds()
        assert 3500 < left_s <= 3600
        assert (await door.client.patch(SQL, json={"ttl_s": None})).json()["expires_at"] is None

    visit(test)


def test_a_change_on_a_condition_that_no_longer_holds_changes_nothing(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        seen = {"If-Match": (await door.client.get(SQL)).headers["etag"]}
        first = await door.client.patch(SQL, json={"labels": {"a": "1"}}, headers=seen)
        late = await door.client.patch(SQL, json={"labels": {"a": "2"}}, headers=seen)
        gone = await door.client.delete(SQL, headers=seen)
        assert [first.status_code, late.status_code, gone.status_code] == [200, 412, 412]
        assert (await door.client.get(SQL)).json()["labels"] == {"a": "1"}
        assert (await door.client.delete(SQL, headers={"If-Match": first.headers["etag"]})).status_code == 204

    visit(test)


def test_an_adapters_own_numbers(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        counts = door.front.metrics.of_adapter("sql")
        counts.outcomes["length"] += 2
        counts.num_generated_tokens += 7
        shown = (await door.client.get(SQL + "/metrics")).json()
        assert (shown["requests"], shown["generated_tokens"], shown["in_flight"]) == ({"length": 2}, 7, 0)
        assert (await door.client.get("/admin/v1/adapters/nobody/metrics")).status_code == 404

    visit(test)
