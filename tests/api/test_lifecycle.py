"""Starting, serving, draining: what a server says of itself, and how it lets its guests finish."""

from __future__ import annotations

import asyncio

import httpx

from server.api.app import create_app
from server.settings import Settings
from tests.api.asgi_call import AsgiCall
from tests.api.conftest import Door, Visit


def test_while_the_base_loads_the_port_answers_503() -> None:
    async def test() -> None:
        transport = httpx.ASGITransport(create_app(Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for path in ("/health", "/ping", "/v2/health/ready"):
                answer = await client.get(path)
                assert (answer.status_code, answer.json()["error_type"]) == (503, "healthcheck")
            assert (await client.get("/v2/health/live")).status_code == 200
            assert (await client.get("/version")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            answer = await client.post("/generate", json={"inputs": "a"})
            assert (answer.status_code, answer.json()["error_type"]) == (503, "loading")
            assert answer.headers["retry-after"] == "1"
            admin = await client.get("/admin/v1/adapters")
            assert (admin.status_code, admin.json()["error"]["code"]) == (503, "loading")

    asyncio.run(test())


def test_a_ready_server_is_healthy_with_an_empty_body(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for method, path in (
            ("GET", "/"),
            ("GET", "/health"),
            ("GET", "/ping"),
            ("POST", "/ping"),
            ("GET", "/v2/health/ready"),
        ):
            answer = await door.client.request(method, path)
            assert (answer.status_code, answer.content) == (200, b"")
        door.front.engine.state = "restarting"
        answer = await door.client.get("/health")
        assert answer.status_code == 503
        assert "restarting" in answer.json()["error"]

    visit(test)


def test_a_drain_lets_guests_finish_and_takes_no_new_ones(visit: Visit) -> None:
    async def test(door: Door) -> None:
        call = AsgiCall(door.app, "/generate_stream", {"inputs": "@slow"})
        await call.wait_for_chunks(1)
        drain = asyncio.create_task(door.service.drain(10))
        await asyncio.sleep(0)
        assert (await door.client.get("/health")).status_code == 503
        refused = await door.generate()
        assert (refused.status_code, refused.json()["error_type"]) == (503, "draining")
        assert not drain.done()
        assert await drain is True
        await call.finish()
        assert '"generated_text":" one' in call.text

    visit(test)


def test_a_drain_ends_at_its_timeout(visit: Visit) -> None:
    async def test(door: Door) -> None:
        call = AsgiCall(door.app, "/generate", {"inputs": "@hang"})
        await asyncio.wait_for(door.front.opened.wait(), 10)
        assert await door.service.drain(0.01) is False
        assert door.service.in_house == 1
        call.leave()
        await call.finish()
        assert await door.service.drain(1) is True

    visit(test)


def test_the_house_takes_so_many_and_no_more(visit: Visit) -> None:
    async def test(door: Door) -> None:
        call = AsgiCall(door.app, "/generate", {"inputs": "@hang"})
        await asyncio.wait_for(door.front.opened.wait(), 10)
        answer = await door.generate()
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        call.leave()
        await call.finish()
        assert (await door.generate()).status_code == 200

    visit(test, max_concurrent_requests=1)


def test_request_ids_are_kept_or_given(visit: Visit) -> None:
    async def test(door: Door) -> None:
        kept = await door.client.get("/health", headers={"x-request-id": "abc-123"})
        assert kept.headers.get_list("x-request-id") == ["abc-123"]
        given = {(await door.client.get("/health")).headers["x-request-id"] for _ in range(3)}
        assert len(given) == 3
        for strange in ("a b", "x" * 500, "<script>"):
            answer = await door.client.get("/health", headers={"x-request-id": strange})
            assert answer.headers["x-request-id"] != strange

    visit(test)


def test_info_tells_model_and_limits(visit: Visit) -> None:
    async def test(door: Door) -> None:
        info = (await door.client.get("/info")).json()
        assert info["model_id"] == "mine"
        assert (info["max_total_tokens"], info["max_input_tokens"], info["max_input_length"]) == (512, 511, 511)
        assert (info["router"], info["model_dtype"], info["max_best_of"]) == ("veneer", "torch.float32", 3)

    visit(test, served_model_name=("mine",), max_best_of=3)
