"""Keys with scopes: what is out of scope does not exist, whichever way one asks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from server.api.caller import Caller
from server.api.operation import Operation
from server.keys import revoke_key
from server.settings import Settings
from tests.api.conftest import Door, Visit
from tests.api.keyed import make_keys, of, read, write
from tests.api.test_auth import PUBLIC
from tests.api.test_metrics_route import scrape

SEEN, HIDDEN, NEVER = "sql", "pirate", "nobody"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return make_keys(
        tmp_path / "keys.json",
        root={"scopes": ["read", "generate", "admin"]},
        bi={"scopes": ["generate", "read"], "adapters": [SEEN, "bi/*"]},
        owner={"scopes": ["admin"], "adapters": [SEEN, "bi/*"]},
        reader={"scopes": ["read"]},
        nobase={"scopes": ["generate"], "base": False},
    )


async def fill(door: Door) -> None:
    door.client.headers.update(of("root"))
    for name in (SEEN, HIDDEN, "bi/red", "sql2"):
        assert (await door.upload(name)).status_code == 201
        await door.client.post(f"/admin/v1/adapters/{name}/load", json={})
    del door.client.headers["authorization"]


async def answer_about(door: Door, name: str, method: str, path: str, key: str, **options: Any) -> tuple[int, str]:
    """Status and text with the name blotted out, so that answers about two names can be compared."""
    answer = await door.client.request(method, path.replace("{name}", name), headers=of(key), **options)
    return answer.status_code, answer.text.replace(name, "NAME")


def test_what_is_out_of_scope_answers_as_what_never_was(visit: Visit, keys: Path) -> None:
    async def test(door: Door) -> None:
        await fill(door)

        async def told(name: str) -> list[tuple[int, str]]:
            answers = []
            for adapter in (name, f"{name}@1", f"{name}@prod", f"{name}@9"):
                body = {"inputs": "a b", "adapter": adapter}
                answer = await door.client.post("/generate", json=body, headers=of("bi"))
                answers.append((answer.status_code, answer.text.replace(name, "NAME")))
            parts = door.parts(name)
            answers.append(await answer_about(door, name, "POST", "/admin/v1/adapters", "owner", files=parts))
            for path, order in (
                ("/admin/v1/adapters", {"name": name, "source": {"uri": "org/sql-lora"}}),
                ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "org/sql-lora"}),
                ("/v1/unload_lora_adapter", {"lora_name": name}),
            ):
                answers.append(await answer_about(door, name, "POST", path, "owner", json=order))
            for path in ("", "/versions", "/versions/1"):
                answers.append(await answer_about(door, name, "GET", "/admin/v1/adapters/{name}" + path, "bi"))
                answers.append(await answer_about(door, name, "DELETE", "/admin/v1/adapters/{name}" + path, "owner"))
            for path in ("load", "unload"):
                answers.append(await answer_about(door, name, "POST", "/admin/v1/adapters/{name}/" + path, "owner"))
            alias = "/admin/v1/adapters/{name}/aliases/prod"
            answers.append(await answer_about(door, name, "PUT", alias, "owner", json={"version": 1}))
            return answers

        hidden, never = await told(HIDDEN), await told(NEVER)
        assert hidden == never
        assert {status for status, _ in hidden} <= {404, 405}
        assert 200 in {status for status, _ in await told(SEEN)}, "what it sees, works"
        still_there = await door.client.get(f"/admin/v1/adapters/{HIDDEN}", headers=of("root"))
        assert still_there.json()["latest_version"] == 1

    visit(test, keys_file=keys, allow_runtime_lora_updating=True)


def test_no_name_out_of_scope_is_suggested_listed_counted_or_a_label(visit: Visit, keys: Path) -> None:
    async def test(door: Door) -> None:
        await fill(door)
        mistyped = await door.client.post("/generate", json={"inputs": "a", "adapter": "sqll"}, headers=of("bi"))
        assert "Did you mean 'sql'?" in mistyped.json()["error"]
        assert (
            "Did you mean"
            not in (
                await door.client.post("/generate", json={"inputs": "a", "adapter": HIDDEN[:-1]}, headers=of("bi"))
            ).text
        )
        for name in (SEEN, HIDDEN):
            await door.client.post("/generate", json={"inputs": "a", "adapter": name}, headers=of("root"))
        told = {}
        for key, headers in (("bi", of("bi")), ("root", of("root")), ("nobody", {})):
            texts = [
                (await door.client.get(path, headers=headers)).text
                for path in ("/info", "/metrics", "/admin/v1/adapters", "/admin/v1/cache")
            ]
            told[key] = "\n".join(texts)
        assert HIDDEN in told["root"], "the negative control: it is told to whoever sees it"
        for key in ("bi", "nobody"):
            assert HIDDEN not in told[key]
            assert "sql2" not in told[key]
        assert SEEN in told["bi"]
        assert SEEN not in told["nobody"]

    visit(test, keys_file=keys)


def test_info_counts_what_the_key_sees(visit: Visit, keys: Path) -> None:
    async def test(door: Door) -> None:
        await fill(door)

        async def number(headers: dict[str, str]) -> Any:
            return (await door.client.get("/info", headers=headers)).json()["num_adapters"]

        assert [await number(of("root")), await number(of("bi")), await number({})] == [4, 2, None]
        assert await number({"Authorization": "Bearer wrong"}) is None

    visit(test, keys_file=keys)


def test_labels_are_those_that_the_key_sees(visit: Visit, keys: Path) -> None:
    async def test(door: Door) -> None:
        await fill(door)

        async def residents(headers: dict[str, str]) -> str:
            door.client.headers.update(headers)
            found = await scrape(door)
            door.client.headers.pop("authorization", None)
            return found["vllm:lora_requests_info"][0][0]["running_lora_adapters"]

        assert await residents(of("root")) == "bi/red,pirate,sql,sql2"
        assert await residents(of("bi")) == "bi/red,sql"
        assert await residents({}) == ""

    visit(test, keys_file=keys)


def test_pages_hold_what_the_key_sees(visit: Visit, keys: Path) -> None:
    async def test(door: Door) -> None:
        await fill(door)
        names: list[str] = []
        token: str | None = ""
        while token is not None:
            query: dict[str, str | int] = {"limit": 1, "page_token": token}
            page = (await door.client.get("/admin/v1/adapters", params=query, headers=of("bi"))).json()
            names += [adapter["name"] for adapter in page["data"]]
            token = page["next_page_token"]
            assert token in (None, *names), "a token must not name what is hidden"
        assert names == ["bi/red", "sql"]
        page = (await door.client.get("/admin/v1/adapters?prefix=s", headers=of("bi"))).json()
        assert [adapter["name"] for adapter in page["data"]] == ["sql"]
        page = (await door.client.get("/admin/v1/adapters?prefix=bi/r", headers=of("bi"))).json()
        assert [adapter["name"] for adapter in page["data"]] == ["bi/red"]

    visit(test, keys_file=keys)


def test_scopes_say_what_a_key_may_do(visit: Visit, keys: Path) -> None:
    async def test(door: Door) -> None:
        await fill(door)

        async def statuses(key: str) -> list[int]:
            generated = await door.client.post("/generate", json={"inputs": "a", "adapter": SEEN}, headers=of(key))
            shown = await door.client.get(f"/admin/v1/adapters/{SEEN}", headers=of(key))
            loaded = await door.client.post(f"/admin/v1/adapters/{SEEN}/load", headers=of(key))
            return [answer.status_code for answer in (generated, shown, loaded)]

        assert await statuses("bi") == [200, 200, 403]
        assert await statuses("owner") == [403, 200, 200]
        assert await statuses("reader") == [403, 200, 403]
        assert await statuses("nobase") == [200, 403, 403]
        assert await statuses("root") == [200, 200, 200]
        assert await statuses("stranger") == [401, 401, 401]
        assert (await door.client.post("/generate", json={"inputs": "a"}, headers=of("nobase"))).status_code == 403

    visit(test, keys_file=keys)


def test_every_route_is_by_name_or_keeps_to_scope_or_is_closed_to_bound_keys(visit: Visit, keys: Path) -> None:
    async def test(door: Door) -> None:
        await fill(door)
        paths = {(method, path) for path, item in door.app.openapi()["paths"].items() for method in item}
        open_to_bound_keys = set()
        for method, path in sorted(paths):
            if path in (*PUBLIC, "/", "/generate", "/generate_stream") or "{name}" in path:
                continue
            answer = await door.client.request(method, re.sub(r"\{\w+\}", "1", path), headers=of("owner"))
            if answer.status_code != 403:
                open_to_bound_keys.add((method, path))
        assert open_to_bound_keys >= {("get", "/admin/v1/adapters"), ("get", "/admin/v1/cache")}
        assert open_to_bound_keys <= KNOWN_TO_KEEP_TO_SCOPE, "a new route that names no adapter in its path: test it"

    visit(test, keys_file=keys)


KNOWN_TO_KEEP_TO_SCOPE = {
    ("get", "/admin/v1/adapters"),
    ("post", "/admin/v1/adapters"),
    ("get", "/admin/v1/cache"),
    ("get", "/admin/v1/usage"),
    ("get", "/admin/v1/operations"),
    ("get", "/admin/v1/operations/{operation_id}"),
    ("get", "/admin/v1/operations/{operation_id}/events"),
    ("delete", "/admin/v1/operations/{operation_id}"),
    ("post", "/v1/load_lora_adapter"),
    ("post", "/v1/unload_lora_adapter"),
}


def test_operations_on_what_is_out_of_scope_do_not_exist(visit: Visit, keys: Path) -> None:
    async def work(operation: Operation) -> dict[str, Any]:
        return {}

    async def test(door: Door) -> None:
        book = door.service.operations
        started = {name: book.start("adapter.register", name, work, actor="root") for name in (SEEN, HIDDEN)}

        async def told(operation_id: str, key: str) -> list[tuple[int, str]]:
            address = "/admin/v1/operations/{name}"
            asked = [("GET", address), ("GET", address + "/events"), ("DELETE", address)]
            return [await answer_about(door, operation_id, method, path, key) for method, path in asked]

        assert await told(started[HIDDEN].id, "owner") == await told("op_never", "owner")
        assert {status for status, _ in await told(started[SEEN].id, "owner")} == {200, 409}, "what has ended"
        assert {status for status, _ in await told(started[HIDDEN].id, "root")} == {200, 409}
        listed = (await door.client.get("/admin/v1/operations", headers=of("owner"))).json()["data"]
        assert [operation["target"] for operation in listed] == [SEEN]

    visit(test, keys_file=keys)


def test_a_key_stops_and_starts_without_a_restart(visit: Visit, keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(door: Door) -> None:
        async def status(key: str) -> int:
            return (await door.client.post("/generate", json={"inputs": "a"}, headers=of(key))).status_code

        assert [await status("bi"), await status("late")] == [200, 401]
        revoke_key(keys, "bi")
        make_keys(keys, late={}, gone={"expires_at": "2026-01-01T00:00:00Z"})
        assert [await status("bi"), await status("late"), await status("gone")] == [401, 200, 401]
        sound = read(keys)
        for broken in ("{", json.dumps({"schema": 2, "keys": []}), '{"schema": 1, "keys": [{"name": "x"}]}'):
            write(keys, broken)
            assert [await status("bi"), await status("late")] == [401, 200], "the last sound state holds"
        write(keys, None)
        assert await status("late") == 200
        assert "the keys stay as they were" in caplog.text
        write(keys, sound.replace('"late"', '"later"'))
        assert await status("late") == 200

    visit(test, keys_file=keys)


def test_an_empty_keys_file_opens_nothing(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"schema": 1, "keys": []}')

    async def test(door: Door) -> None:
        assert (await door.generate()).status_code == 401
        assert (await door.client.get("/admin/v1/adapters")).status_code == 401
        assert (await door.client.get("/health")).status_code == 200

    visit(test, keys_file=path)


def test_keys_of_the_command_line_work_beside_a_file(visit: Visit, keys: Path) -> None:
    async def test(door: Door) -> None:
        async def statuses(key: str) -> list[int]:
            headers = {"Authorization": f"Bearer {key}"}
            generated = await door.client.post("/generate", json={"inputs": "a"}, headers=headers)
            return [generated.status_code, (await door.client.get("/admin/v1/adapters", headers=headers)).status_code]

        assert await statuses("plain") == [200, 403], "beside a file an API key never administers"
        assert await statuses("key-of-root") == [200, 200]

    visit(test, keys_file=keys, api_key=[SecretStr("plain")])


def test_prompts_are_shared_within_a_tenant_only(visit: Visit, tmp_path: Path) -> None:
    path = make_keys(tmp_path / "keys.json", a={"tenant": "one"}, b={"tenant": "one"}, c={})

    async def salts(door: Door, *headers: dict[str, str]) -> list[str]:
        for each in headers:
            assert (await door.client.post("/generate", json={"inputs": "a"}, headers=each)).status_code == 200
        return [request.cache_salt for request in door.front.requests]

    async def apart(door: Door) -> None:
        a, b, c = await salts(door, of("a"), of("b"), of("c"))
        assert a == b != c
        assert "" not in (a, c)

    async def plain(door: Door) -> None:
        first, second, first_again = await salts(door, of("x"), of("y"), of("x"))
        assert first == first_again != second

    async def shared(door: Door) -> None:
        assert await salts(door, of("a"), of("c")) == ["", ""]

    async def without_keys(door: Door) -> None:
        assert await salts(door, {}) == [""]

    visit(apart, keys_file=path)
    visit(plain, api_key=[SecretStr("key-of-x"), SecretStr("key-of-y")])
    visit(shared, keys_file=path, share_prefix_cache=True)
    visit(without_keys)


def test_with_an_admin_port_the_admin_routes_are_there_alone(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(door.app), base_url="http://localhost:8001"
        ) as at_admin_port:
            assert (await at_admin_port.get("/admin/v1/adapters")).status_code == 200
            assert (await at_admin_port.get("/health")).status_code == 200
        assert (await door.client.get("/admin/v1/adapters")).status_code == 404
        assert (await door.generate()).status_code == 200

    visit(test, admin_port=8001)
    with pytest.raises(ValueError, match="--admin-port is --port"):
        Settings(port=8001, admin_port=8001)


def test_patterns_are_names_beginnings_or_all() -> None:
    caller = Caller("bi", adapters=("sql", "bi/*"))
    assert [caller.sees(name) for name in ("sql", "bi/red", "bi/")] == [True] * 3
    assert [caller.sees(name) for name in ("sql2", "sq", "bi", "SQL", "xbi/red", "")] == [False] * 6
    assert Caller("all").sees("anything")
