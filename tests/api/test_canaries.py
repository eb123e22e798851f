"""Canaries that are taken back by themselves, and gates that golden prompts keep."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest

from adapters_store.alias import Alias
from server.library import releases as releases_module
from tests.api.conftest import Door, Visit

SQL = "/admin/v1/adapters/sql"
PROD = SQL + "/aliases/prod"
CANARY, GATE = PROD + "/canary", PROD + "/gate"
GOOD = {"prompts": [{"inputs": "a", "max_new_tokens": 3, "contains": ["arr", "two"]}]}
BAD = {"prompts": [{"inputs": "a", "contains": ["certainly not"]}]}


async def two_versions(door: Door) -> None:
    for rank in (1, 2):
        await door.upload("sql", config=b'{"r": %d}' % rank, promote=rank == 1)
    assert (await door.client.put(PROD, json={"version": 1})).status_code == 200


async def start(door: Door, **body: Any) -> httpx.Response:
    order = {"version": 2, "percent": 50, "max_error_rate": 0.2, "min_requests": 5, "window": 10}
    return await door.client.post(CANARY, json=order | body)


async def meaning(door: Door) -> Any:
    return (await door.client.get(SQL)).json()["aliases"]["prod"]


async def fail_on(door: Door, version: int, number: int) -> None:
    for _ in range(number):
        assert (await door.generate("@early", adapter=f"sql@{version}")).status_code == 424


async def until_ended(door: Door) -> dict[str, Any]:
    for _ in range(100):
        shown = (await door.client.get(CANARY)).json()
        if shown["state"] != "running":
            return dict(shown)
        await asyncio.sleep(0.02)
    raise AssertionError("the canary did not end")


def test_a_canary_that_fails_too_often_is_taken_back_by_itself(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        assert (await start(door)).status_code == 201
        assert await meaning(door) == {"1": 50, "2": 50}
        await fail_on(door, 2, 5)
        ended = await until_ended(door)
        assert (ended["state"], ended["version"]) == ("rolled_back", 2)
        assert "5 of its last 5 requests failed, more than 20.0%" in ended["reason"]
        assert await meaning(door) == 1
        line = (await door.client.get("/admin/v1/audit?adapter=sql&limit=1")).json()["data"][0]
        assert (line["actor"], line["action"]) == ("canary", "canary.rolled_back")
        assert line["detail"]["after"] == {"1": 1}
        again = await door.client.post(PROD + "/rollback")
        assert again.status_code == 409, "a rollback does not bring the canary back"

    visit(test)


def test_streams_that_break_off_count_as_failures(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await start(door)
        for _ in range(5):
            await door.generate("@fail", path="/generate_stream", adapter="sql@2")
        assert (await until_ended(door))["state"] == "rolled_back"

    visit(test)


def test_a_canary_goes_on_while_few_fail_and_failures_elsewhere_do_not_count(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await start(door)
        await fail_on(door, 1, 20)
        await fail_on(door, 2, 1)
        for _ in range(9):
            await door.generate(adapter="sql@2")
        shown = (await door.client.get(CANARY)).json()
        assert (shown["state"], shown["requests"], shown["failed"]) == ("running", 10, 1)
        assert shown["error_rate"] == pytest.approx(0.1)
        assert await meaning(door) == {"1": 50, "2": 50}

    visit(test)


def test_nothing_is_decided_on_few_requests(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await start(door)
        await fail_on(door, 2, 4)
        await asyncio.sleep(0.05)
        assert (await door.client.get(CANARY)).json()["state"] == "running"

    visit(test)


def test_one_that_turns_bad_late_is_still_taken_back(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await start(door)
        for _ in range(30):
            await door.generate(adapter="sql@2")
        await fail_on(door, 2, 3)
        assert (await until_ended(door))["state"] == "rolled_back"

    visit(test)


def test_a_canary_is_stopped_by_hand(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await start(door)
        stopped = await door.client.delete(CANARY)
        assert (stopped.status_code, stopped.json()["state"]) == (200, "stopped")
        assert await meaning(door) == 1
        assert (await door.client.delete(CANARY)).json()["error"]["code"] == "canary_conflict"

    visit(test)


def test_a_canary_is_promoted_by_moving_the_alias_and_then_watched_no_more(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await start(door)
        await door.client.put(PROD, json={"version": 2})
        assert (await door.client.get(CANARY)).json()["state"] == "moved"
        await fail_on(door, 2, 10)
        await asyncio.sleep(0.05)
        assert await meaning(door) == 2

    visit(test)


def test_a_canary_needs_an_alias_of_one_other_version(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        assert (await start(door, version=1)).json()["error"]["code"] == "canary_conflict"
        assert (await start(door, version=9)).json()["error"]["code"] == "version_not_found"
        assert await meaning(door) == 1
        assert (await door.client.get(CANARY)).json()["error"]["code"] == "canary_conflict", "nothing was left behind"
        assert (await start(door)).status_code == 201
        assert (await start(door)).json()["error"]["code"] == "canary_conflict"
        assert (await start(door, min_requests=11)).status_code == 422
        unknown = await door.client.post(SQL + "/aliases/beta/canary", json={"version": 2})
        assert unknown.json()["error"]["code"] == "alias_not_found"

    visit(test)


def test_a_canary_outlives_the_process_that_started_it(visit: Visit) -> None:
    async def first(door: Door) -> None:
        await two_versions(door)
        await start(door)

    async def second(door: Door) -> None:
        assert await meaning(door) == {"1": 50, "2": 50}
        shown = (await door.client.get(CANARY)).json()
        assert (shown["state"], shown["requests"]) == ("running", 0)
        await fail_on(door, 2, 5)
        assert (await until_ended(door))["state"] == "rolled_back"

    visit(first)
    visit(second)


def test_requests_through_the_alias_find_the_failing_canary(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await start(door)
        statuses: Counter[int] = Counter()
        for number in range(60):
            answer = await door.generate("@early", adapter="sql@prod", sticky_key=f"user-{number}")
            statuses[answer.status_code] += 1
            if await meaning(door) == 1:
                break
            await asyncio.sleep(0)
        assert (await until_ended(door))["state"] == "rolled_back"

    visit(test)


def test_an_alias_moves_through_its_gate_only(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        assert (await door.client.put(GATE, json=BAD)).status_code == 200
        assert (await door.client.get(PROD)).json()["gated"] is True
        refused = await door.client.put(PROD, json={"version": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "gate_failed")
        assert "does not contain 'certainly not'" in refused.json()["error"]["message"]
        weighed = await door.client.put(PROD, json={"weights": {"1": 99, "2": 1}})
        assert weighed.status_code == 409, "a share is a move, too"
        assert (await start(door)).status_code == 409, "so is a canary"
        assert await meaning(door) == 1
        assert (await door.client.put(GATE, json=GOOD)).status_code == 200
        assert (await door.client.put(PROD, json={"version": 2})).status_code == 200
        assert door.front.num_open == 0

    visit(test)


def test_a_rollback_and_what_is_served_already_need_no_gate(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await door.client.put(PROD, json={"version": 2})
        await door.client.put(GATE, json=BAD)
        assert (await door.client.put(PROD, json={"version": 2})).status_code == 200
        assert (await door.client.post(PROD + "/rollback")).status_code == 200
        assert await meaning(door) == 1

    visit(test)


def test_an_upload_does_not_pass_by_a_gate(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await door.client.put(SQL + "/aliases/default/gate", json=BAD)
        answer = await door.upload("sql", config=b'{"r": 3}', alias="free")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "gate_failed")
        shown = (await door.client.get(SQL)).json()
        assert (shown["latest_version"], shown["aliases"]["default"], shown["aliases"]["free"]) == (3, 1, 3)
        await door.client.put(SQL + "/aliases/default/gate", json=GOOD)
        assert (await door.upload("sql", config=b'{"r": 4}')).status_code == 201
        assert (await door.client.get(SQL)).json()["aliases"]["default"] == 4

    visit(test)


def test_a_gate_is_skipped_on_purpose_and_the_log_says_so(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await door.client.put(GATE, json=BAD)
        assert (await door.client.put(PROD + "?skip_gate=true", json={"version": 2})).status_code == 200
        line = (await door.client.get("/admin/v1/audit?limit=1")).json()["data"][0]
        assert line["detail"]["skip_gate"] is True

    visit(test)


def test_a_version_is_asked_without_being_moved_to(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        assert (await door.client.get(GATE)).json()["error"]["code"] == "gate_not_found"
        prompts = [*GOOD["prompts"], {"inputs": "@early"}, {"inputs": "b", "lacks": ["arr"]}]
        await door.client.put(GATE, json={"prompts": prompts, "min_passed": 1})
        assert (await door.client.get(GATE)).json()["min_passed"] == 1
        verdict = (await door.client.post(GATE + "/check?version=2")).json()
        assert (verdict["adapter"], verdict["passed"]) == ("sql@2", True)
        assert [result["reason"] is None for result in verdict["results"]] == [True, False, False]
        assert "the engine could not do it" in verdict["results"][1]["reason"]
        assert await meaning(door) == 1
        assert (await door.client.delete(GATE)).status_code == 204
        assert (await door.client.get(PROD)).json()["gated"] is False

    visit(test)


def test_a_deleted_adapter_leaves_no_gate_to_whoever_takes_its_name(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        await door.client.put(SQL + "/aliases/default/gate", json=BAD)
        await door.client.delete(SQL)
        assert (await door.upload("sql")).status_code == 201

    visit(test)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompts": []},
        {"prompts": [{"inputs": ""}]},
        {"prompts": [{"inputs": "a", "matches": "x"}]},
        {"prompts": [{"inputs": "a", "contains": [""]}]},
        {"prompts": [{"inputs": "a"}], "min_passed": 2},
    ],
)
def test_gates_that_mean_nothing_are_refused(visit: Visit, body: dict[str, Any]) -> None:
    async def test(door: Door) -> None:
        await two_versions(door)
        assert (await door.client.put(GATE, json=body)).status_code == 422

    visit(test)


def test_another_process_follows_a_canary(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases_module, "REFRESH_S", 0.0)

    async def test(door: Door) -> None:
        await two_versions(door)
        catalog = door.front.library.catalog
        other = releases_module.Releases(catalog)
        other.observe("sql", 2, failed=False)
        await start(door)
        for _ in range(8):
            other.observe("sql", 2, failed=True)
            await asyncio.sleep(0.03)
        assert (await until_ended(door))["state"] == "rolled_back"
        assert catalog.record("sql").routes["prod"].weights == Alias({1: 1}).weights
        await other.close()

    visit(test)
