"""`Idempotency-Key`: a request that comes again is answered again and carried out once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from pydantic import SecretStr

from server.api.operation import Operation
from tests.api.conftest import Door, OpenDoor, Visit, safetensors_bytes

ADAPTERS, SQL = "/admin/v1/adapters", "/admin/v1/adapters/sql"
KEY = {"Idempotency-Key": "deploy-7"}


async def upload(
    door: Door, config: bytes = b'{"r": 4}', headers: dict[str, str] = KEY, **fields: Any
) -> httpx.Response:
    return await door.client.post(ADAPTERS, files=door.parts("sql", config, **fields), headers=headers)


async def actions(door: Door) -> list[str]:
    return [line["action"] for line in (await door.client.get("/admin/v1/audit")).json()["data"]]


def is_replay(answer: httpx.Response) -> bool:
    return bool(answer.headers.get("idempotent-replayed") == "true")


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_an_upload_that_comes_again_gets_the_first_answer(visit: Visit) -> None:
    async def test(door: Door) -> None:
        first = await upload(door)
        assert (first.status_code, is_replay(first)) == (201, False)
        await door.upload("sql", config=b'{"r": 8}')
        again = await upload(door)
        assert (again.status_code, is_replay(again)) == (201, True), "a form's boundary is another each time"
        assert again.content == first.content
        for name in ("location", "etag", "content-type", "content-length"):
            assert again.headers[name] == first.headers[name]
        assert (await door.client.get(SQL)).json()["aliases"] == {"default": 2}, "no alias has moved again"
        assert await actions(door) == ["adapter.upload", "adapter.upload"]
        assert door.leftovers() == []

    visit(test)


def test_a_rollback_that_comes_again_goes_back_once(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for rank in (1, 2, 3):
            await door.upload("sql", config=b'{"r": %d}' % rank)
        place = SQL + "/aliases/default/rollback"
        for _ in range(2):
            assert (await door.client.post(place, headers=KEY)).json()["aliases"] == {"default": 2}
        assert (await door.client.post(place)).json()["aliases"] == {"default": 1}, "the control: without a key"

    visit(test)


def test_the_same_key_for_another_request_is_refused(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload(door)
        for other in (
            await upload(door, config=b'{"r": 8}'),
            await upload(door, alias="prod"),
            await door.client.post(ADAPTERS + "?dry_run=true", files=door.parts("sql"), headers=KEY),
            await upload(door, headers={**KEY, "If-None-Match": "*"}),
            await door.client.delete(SQL, headers=KEY),
            await door.client.post(SQL + "/load", headers=KEY),
        ):
            assert code(other) == (422, "idempotency_key_reused")
        assert (await upload(door, config=b'{"r": 8}', headers={"Idempotency-Key": "deploy-8"})).status_code == 201
        assert await actions(door) == ["adapter.upload", "adapter.upload"]

    visit(test)


def test_a_refusal_is_not_kept(visit: Visit) -> None:
    async def test(door: Door) -> None:
        assert code(await upload(door, config=b"no json")) == (422, "invalid_config")
        assert (await upload(door)).status_code == 201

    visit(test)


def test_every_kind_of_change_is_answered_again(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        await door.upload("sql", config=b'{"r": 8}')
        changes: list[tuple[str, str, Any]] = [
            ("PATCH", SQL, {"labels": {"team": "bi"}}),
            ("PUT", SQL + "/aliases/prod", {"version": 1}),
            ("PUT", SQL + "/aliases/prod/gate", {"prompts": [{"inputs": "a"}]}),
            ("POST", SQL + "/load", {"tier": "device"}),
            ("DELETE", SQL + "/aliases/prod", None),
            ("DELETE", SQL, None),
        ]
        for number, (method, path, body) in enumerate(changes):
            headers = {"Idempotency-Key": f"change-{number}"}
            first = await door.client.request(method, path, json=body, headers=headers)
            lines = await actions(door)
            again = await door.client.request(method, path, json=body, headers=headers)
            assert first.status_code < 300, first.text
            assert (again.status_code, again.content) == (first.status_code, first.content)
            assert (is_replay(first), is_replay(again)) == (False, True)
            assert await actions(door) == lines

    visit(test)


def test_looking_takes_no_key(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for _ in range(2):
            assert not is_replay(await door.client.get(ADAPTERS, headers=KEY))
        assert not (door.root / "answers").exists()

    visit(test)


def test_while_the_first_is_under_way_the_second_is_told_to_wait(visit: Visit) -> None:
    async def test(door: Door) -> None:
        request = door.client.build_request("POST", ADAPTERS, files=door.parts("sql"))
        content, kind = request.read(), request.headers["content-type"]
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield content[:40]
            begun.set()
            await go_on.wait()
            yield content[40:]

        headers = {**KEY, "content-type": kind}
        first = asyncio.create_task(door.client.post(ADAPTERS, content=slowly(), headers=headers))
        await begun.wait()
        second = await upload(door)
        assert (code(second), second.headers["retry-after"]) == ((409, "idempotency_in_progress"), "1")
        go_on.set()
        assert (await first).status_code == 201
        assert is_replay(await upload(door)), "pieces of another size are the same body"

    visit(test)


def test_another_server_on_the_store_knows_the_answer(visit: Visit) -> None:
    async def test(door: Door) -> None:
        first = await upload(door)
        async with OpenDoor(door.root, 10, door.settings) as other:
            assert (await upload(other)).content == first.content
            assert is_replay(await upload(other))

    visit(test)


def test_a_key_is_its_callers_own(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for name, replayed in (("one", False), ("two", False), ("one", True)):
            answer = await upload(door, headers={**KEY, "Authorization": f"Bearer {name}"})
            assert is_replay(answer) == replayed
        assert code(await upload(door)) == (401, "unauthorized")

    visit(test, admin_api_key=[SecretStr("one"), SecretStr("two")])


def test_work_in_the_background_is_told_of_again_while_it_is_known(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        body = {"wait": False}
        first = await door.client.post(SQL + "/load", json=body, headers=KEY)
        again = await door.client.post(SQL + "/load", json=body, headers=KEY)
        assert (first.status_code, again.status_code, is_replay(again)) == (202, 202, True)
        assert first.headers["location"] == again.headers["location"]
        book = cast(Any, door.service.operations)
        await cast(Operation, book._operations.popitem()[1]).wait(5)  # as after a restart
        anew = await door.client.post(SQL + "/load", json=body, headers=KEY)
        assert (anew.status_code, is_replay(anew)) == (202, False)
        assert anew.headers["location"] != first.headers["location"]

    visit(test)


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\u00e4"])
def test_a_key_that_is_none_is_refused(visit: Visit, key: str) -> None:
    async def test(door: Door) -> None:
        answer = await upload(door, headers={"Idempotency-Key": cast(str, key.encode())})
        assert code(answer) == (422, "invalid_idempotency_key")
        assert (await door.client.get(ADAPTERS)).json()["data"] == []

    visit(test)


def test_an_answer_that_cannot_be_kept_is_given_all_the_same(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(door: Door) -> None:
        (door.root / "answers").write_text("in the way")
        assert (await upload(door)).status_code == 201
        again = await upload(door)
        assert (again.status_code, is_replay(again)) == (200, False), "it is known content then"

    visit(test)


def test_a_body_that_nobody_reads_counts(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for name in ("a", "b"):
            await door.upload(name)
        first = await door.client.request("DELETE", ADAPTERS + "/a", content=b"x" * 100_000, headers=KEY)
        assert first.status_code == 204
        again = await door.client.request("DELETE", ADAPTERS + "/a", content=b"x" * 100_000, headers=KEY)
        assert (again.status_code, is_replay(again)) == (204, True)
        other = await door.client.request("DELETE", ADAPTERS + "/a", content=b"y", headers=KEY)
        assert code(other) == (422, "idempotency_key_reused")

    visit(test)


def test_the_same_parts_in_another_order_are_another_body(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await upload(door)
        parts: list[Any] = [
            ("metadata", (None, json.dumps({"name": "sql"}))),
            ("files", ("adapter_model.safetensors", safetensors_bytes())),
            ("files", ("adapter_config.json", b'{"r": 4}')),
        ]
        assert code(await door.client.post(ADAPTERS, files=parts, headers=KEY)) == (422, "idempotency_key_reused")

    visit(test)
