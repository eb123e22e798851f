"""Keys: deny by default, admin apart, and no way in through a browser."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from pydantic import SecretStr

from server.api.app import create_app
from server.api.auth import KeyRing
from server.settings import Settings
from tests.api.conftest import Door, Visit

PUBLIC = {"/health", "/ping", "/v2/health/live", "/v2/health/ready", "/version", "/info", "/metrics"}
API, ADMIN = {"Authorization": "Bearer user-key"}, {"authorization": "bearer admin-key"}


def test_every_route_but_the_public_ones_asks_for_a_key(visit: Visit) -> None:
    async def test(door: Door) -> None:
        routes = [(method, path) for path, item in door.app.openapi()["paths"].items() for method in item]
        assert len(routes) > 15
        for method, path in routes:
            answer = await door.client.request(method, path.replace("{version}", "1"), content=b"{nonsense")
            if path in PUBLIC or (method, path) == ("get", "/"):
                assert answer.status_code == 200, path
            else:
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"

    visit(test, api_key=[SecretStr("user-key")], admin_api_key=[SecretStr("admin-key")], host="127.0.0.1")


def test_a_user_may_generate_and_an_admin_may_everything(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def status(headers: dict[str, str], path: str = "/admin/v1/adapters") -> int:
            if path.startswith("/admin"):
                return (await door.client.get(path, headers=headers)).status_code
            return (await door.client.post(path, json={"inputs": "a"}, headers=headers)).status_code

        assert [await status(API, "/generate"), await status(ADMIN, "/generate")] == [200, 200]
        assert [await status(API), await status(ADMIN)] == [403, 200]
        wrong = {"Authorization": "Bearer user-keyx"}
        assert [await status(wrong, "/generate"), await status(wrong)] == [401, 401]
        for scheme in ("Basic user-key", "user-key", "Bearer", "Bearer  "):
            assert await status({"Authorization": scheme}, "/generate") == 401

    visit(test, api_key=[SecretStr("user-key")], admin_api_key=[SecretStr("admin-key")])


def test_the_401_tells_hub_users_what_to_do(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate()
        assert set(answer.json()) == {"error", "error_type"}
        assert "api_key=" in answer.json()["error"]
        admin = (await door.client.get("/admin/v1/adapters")).json()
        assert admin["error"]["code"] == "unauthorized"

    visit(test, api_key=[SecretStr("user-key")])


def test_without_an_admin_key_the_api_key_administers(visit: Visit) -> None:
    async def test(door: Door) -> None:
        assert (await door.client.get("/admin/v1/adapters", headers=API)).status_code == 200
        assert (await door.client.get("/admin/v1/adapters")).status_code == 401

    visit(test, api_key=[SecretStr("user-key")])


def test_without_any_key_only_loopback_administers(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.client.get("/admin/v1/adapters")
        assert answer.status_code == 403
        assert "--admin-api-key" in answer.json()["error"]["message"]
        assert (await door.generate()).status_code == 200, "generating is open"

    visit(test, host="0.0.0.0")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "[bad"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "https://app.example"}, 200),
    ],
)
def test_without_any_key_no_foreign_web_page_administers(visit: Visit, headers: dict[str, str], status: int) -> None:
    async def test(door: Door) -> None:
        assert (await door.client.get("/admin/v1/adapters", headers=headers)).status_code == status

    visit(test, cors_allow_origin=["https://app.example"])


def test_a_body_is_not_read_before_the_key_is_checked(visit: Visit) -> None:
    async def test(door: Door) -> None:
        read: list[bytes] = []

        async def body() -> AsyncIterator[bytes]:
            for piece in (b"{", b"}"):
                read.append(piece)
                yield piece

        answer = await door.client.post("/generate", content=body(), headers={"content-type": "application/json"})
        assert answer.status_code == 401
        assert read == []

    visit(test, api_key=[SecretStr("user-key")])


def test_cors_is_off_unless_asked_for(visit: Visit) -> None:
    async def closed(door: Door) -> None:
        answer = await door.client.get("/health", headers={"origin": "https://app.example"})
        assert "access-control-allow-origin" not in answer.headers

    async def opened(door: Door) -> None:
        answer = await door.client.get("/health", headers={"origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert {"etag", "location"} <= set(answer.headers["access-control-expose-headers"].split(", "))
        for wanted in ("x-sticky-key", "if-match", "if-none-match"):
            asked = {"origin": "https://app.example", "access-control-request-method": "PUT"}
            preflight = await door.client.options(
                "/generate", headers={**asked, "access-control-request-headers": wanted}
            )
            assert preflight.status_code == 200, wanted
        other = await door.client.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers

    visit(closed)
    visit(opened, cors_allow_origin=["https://app.example"])


def test_a_ring_opens_for_its_keys_alone() -> None:
    ring = KeyRing([SecretStr("a"), SecretStr("b")])
    assert ring.opens("a")
    assert ring.opens("b")
    assert not ring.opens("ab")
    assert not ring.opens("")
    assert not KeyRing([])


def test_docs_can_be_switched_off() -> None:
    assert create_app(Settings()).openapi_url == "/openapi.json"
    assert create_app(Settings(enable_docs=False)).openapi_url is None
