"""The admin routes: the life of an adapter over HTTP, and the shapes of refusals."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.api.conftest import Door, Visit


def test_an_upload_becomes_a_version_that_can_be_used_at_once(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.upload("pirate", alias="prod")
        assert answer.status_code == 201
        version = answer.json()
        assert (version["object"], version["name"], version["version"]) == ("adapter.version", "pirate", 1)
        assert (version["state"], version["base_model"]) == ("ready", "org/base")
        assert [file["path"] for file in version["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
        assert answer.headers["location"] == "/admin/v1/adapters/pirate/versions/1"
        assert (await door.client.get(answer.headers["location"])).json() == version
        for reference in ("pirate", "pirate@prod", "pirate@1", "pirate@default"):
            assert (await door.generate(adapter=reference)).json()["generated_text"].startswith(" arr")

    visit(test)


def test_known_content_makes_no_new_version(visit: Visit) -> None:
    async def test(door: Door) -> None:
        first, again = await door.upload("pirate"), await door.upload("pirate")
        assert (first.status_code, again.status_code) == (201, 200)
        assert again.json()["version"] == 1
        other = await door.upload("pirate", config=b'{"r": 8}')
        assert (other.status_code, other.json()["version"]) == (201, 2)

    visit(test)


def test_a_version_that_is_not_promoted_is_reached_by_its_number(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        await door.upload("pirate", config=b'{"r": 8}', promote=False)
        assert (await door.generate(adapter="pirate")).headers["x-adapter-version"] == "1"
        assert (await door.generate(adapter="pirate@2")).headers["x-adapter-version"] == "2"
        moved = await door.client.put("/admin/v1/adapters/pirate/aliases/default", json={"version": 2})
        assert moved.json()["aliases"] == {"default": 2}
        assert (await door.generate(adapter="pirate")).headers["x-adapter-version"] == "2"

    visit(test)


def test_a_dry_run_keeps_nothing(visit: Visit) -> None:
    async def test(door: Door) -> None:
        files = [("files", ("adapter_config.json", b'{"r": 4}'))]
        metadata = ("metadata", (None, '{"name": "x"}'))
        answer = await door.client.post("/admin/v1/adapters?dry_run=true", files=[metadata, *files])
        assert answer.status_code == 422
        assert "adapter_model.safetensors is missing" in answer.json()["error"]["message"]
        good = await door.client.post("/admin/v1/adapters?dry_run=true", files=door.parts("x"))
        assert good.status_code == 200
        assert good.json()["object"] == "adapter.check"
        assert good.json()["report"]["kind"] == "LORA"
        assert (await door.client.get("/admin/v1/adapters")).json()["data"] == []
        assert door.leftovers() == []

    visit(test)


def test_a_parameter_that_a_route_does_not_have_is_refused_before_anything_happens(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        paths = {(method, path) for path, item in door.app.openapi()["paths"].items() for method in item}
        asked = sorted((method, path) for method, path in paths if path.startswith("/admin/"))
        assert len(asked) > 25
        for method, path in asked:
            address = re.sub(r"\{\w+\}", "1", path.replace("{name}", "sql"))
            answer = await door.client.request(method, address + "?dryrun=true")
            assert answer.status_code == 422, (method, path)
            assert method == "head" or "'dryrun'" in answer.json()["error"]["message"], (method, path)
        one_version = await door.client.delete("/admin/v1/adapters/sql?version=1")
        assert (one_version.status_code, one_version.json()["error"]["code"]) == (422, "validation")
        assert "drain_timeout_s, force" in one_version.json()["error"]["message"]
        multipart = await door.client.post("/admin/v1/adapters?wait=1", files=door.parts("poet"))
        assert (multipart.status_code, multipart.json()["error"]["code"]) == (422, "invalid_upload")
        assert [one["name"] for one in (await door.client.get("/admin/v1/adapters")).json()["data"]] == ["sql"]

    visit(test)


def test_adapters_are_listed_by_pages(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for name in ("a", "b", "org/c"):
            await door.upload(name)
        first = (await door.client.get("/admin/v1/adapters?limit=2")).json()
        assert [adapter["name"] for adapter in first["data"]] == ["a", "b"]
        rest = (await door.client.get(f"/admin/v1/adapters?limit=2&page_token={first['next_page_token']}")).json()
        assert ([adapter["name"] for adapter in rest["data"]], rest["next_page_token"]) == (["org/c"], None)
        some = (await door.client.get("/admin/v1/adapters?prefix=org/")).json()
        assert [adapter["name"] for adapter in some["data"]] == ["org/c"]
        assert (await door.client.get("/admin/v1/adapters?state=failed")).json()["data"] == []

    visit(test)


@pytest.mark.parametrize("name", ["pirate", "org/pirate", "org%2Fpirate"])
def test_an_adapter_is_loaded_shown_evicted_and_deleted(visit: Visit, name: str) -> None:
    async def test(door: Door) -> None:
        plain = name.replace("%2F", "/")
        await door.upload(plain)
        address = f"/admin/v1/adapters/{name}"
        assert (await door.client.get(address)).json()["versions"][0]["residency"]["device"] is None
        loaded = await door.client.post(address + "/load")
        assert loaded.json()["residency"]["device"]["state"] == "ready"
        cache = (await door.client.get("/admin/v1/cache")).json()
        assert [(one["adapter"], one["pins"]) for one in cache["residents"]] == [(f"{plain}@1", 0)]
        assert cache["leases"] == 0
        evicted = await door.client.post(address + "/unload", json={"tier": "device"})
        assert evicted.json()["versions"][0]["residency"]["device"] is None
        assert len((await door.client.get(address + "/versions")).json()["data"]) == 1
        deleted = await door.client.delete(address)
        assert (deleted.status_code, deleted.content) == (204, b"")
        assert (deleted.headers["x-deleted-versions"], deleted.headers["x-requests-left"]) == ("1", "0")
        gone = await door.client.get(address)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "adapter_not_found")
        assert (await door.generate(adapter=plain)).status_code == 404

    visit(test)


def test_one_version_is_deleted_and_its_number_never_comes_back(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        await door.upload("pirate", config=b'{"r": 8}')
        aliased = await door.client.delete("/admin/v1/adapters/pirate/versions/2")
        assert (aliased.status_code, aliased.json()["error"]["code"]) == (409, "alias_in_use")
        deleted = await door.client.delete("/admin/v1/adapters/pirate/versions/1")
        assert (deleted.status_code, deleted.headers["x-deleted-versions"]) == (204, "1")
        assert (await door.client.delete("/admin/v1/adapters/pirate/versions/2?force=true")).status_code == 204
        assert (await door.upload("pirate")).json()["version"] == 3

    visit(test)


def test_an_adapter_in_use_is_not_evicted(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        await door.client.post("/admin/v1/adapters/pirate/load")
        door.front.engine.busy |= set(door.front.engine.loaded)
        answer = await door.client.post("/admin/v1/adapters/pirate/unload")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_in_use")

    visit(test)


def test_what_was_deleted_while_it_was_used_leaves_the_device_with_its_last_request(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        await door.client.post("/admin/v1/adapters/pirate/load")
        engine = door.front.engine
        engine.busy |= set(engine.loaded)
        lease = await door.front.library.resolve("pirate")
        deleted = await door.client.delete("/admin/v1/adapters/pirate?drain_timeout_s=0")
        assert deleted.headers["x-requests-left"] == "1"
        await asyncio.sleep(0.1)
        assert engine.loaded, "it is used"
        lease.release()
        await asyncio.sleep(0.1)
        assert engine.loaded, "the engine has not seen the end of the request yet"
        engine.busy.clear()
        await asyncio.sleep(0.5)
        assert engine.loaded == {}

    visit(test)


def test_adapters_are_listed_and_deleted_while_the_engine_restarts(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        await door.client.post("/admin/v1/adapters/pirate/load")
        door.front.engine.is_gone = True
        assert (await door.client.get("/metrics")).status_code == 200
        listed = (await door.client.get("/admin/v1/adapters")).json()["data"]
        assert listed[0]["versions"][0]["residency"]["device"] is None
        assert (await door.client.post("/admin/v1/adapters/pirate/load")).status_code == 503
        assert (await door.client.delete("/admin/v1/adapters/pirate")).headers["x-deleted-versions"] == "1"

    visit(test)


def test_an_adapter_that_does_not_load_says_why(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("broken")
        answer = await door.client.post("/admin/v1/adapters/broken/load")
        assert answer.status_code == 424
        assert "cut short" in answer.json()["error"]["message"]

    visit(test)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/admin/v1/adapters/nobody", 404, "adapter_not_found"),
        ("GET", "/admin/v1/adapters/nobody/versions", 404, "adapter_not_found"),
        ("GET", "/admin/v1/adapters/nobody/versions/1", 404, "adapter_not_found"),
        ("GET", "/admin/v1/adapters/pirate/versions/9", 404, "version_not_found"),
        ("GET", "/admin/v1/adapters/pirate/versions/x", 422, "validation"),
        ("POST", "/admin/v1/adapters/nobody/load", 404, "adapter_not_found"),
        ("DELETE", "/admin/v1/adapters/nobody", 404, "adapter_not_found"),
        ("GET", "/admin/v1/adapters/..%2F..%2Fetc%2Fpasswd", 422, "invalid_name"),
        ("GET", "/admin/v1/adapters/a,b", 422, "invalid_name"),
        ("GET", "/admin/v1/adapters?limit=0", 422, "validation"),
        ("GET", "/admin/v1/nothing", 404, "not_found"),
        ("PATCH", "/admin/v1/adapters", 405, "method_not_allowed"),
    ],
)
def test_refusals_have_stable_codes(visit: Visit, method: str, path: str, status: int, code: str) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        answer = await door.client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["code"] == code

    visit(test)


def test_alias_names_are_checked(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        for alias, status in (("v3", 422), ("latest", 422), ("prod", 200)):
            answer = await door.client.put(f"/admin/v1/adapters/pirate/aliases/{alias}", json={"version": 1})
            assert answer.status_code == status
        missing = await door.client.put("/admin/v1/adapters/pirate/aliases/prod", json={"version": 9})
        assert missing.json()["error"]["code"] == "version_not_found"

    visit(test)
