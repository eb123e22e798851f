"""vLLM's load and unload routes: its words, its codes, its behaviour under impatient clients."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from server.flags import read_settings
from server.library.directory import AdapterDirectory
from server.library.sources.policy import SourcePolicy
from server.library.sources.puller import Puller
from tests.api.conftest import Door, Visit, safetensors_bytes
from tests.api.keyed import make_keys, of

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
OPEN = {"allow_runtime_lora_updating": True}


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    directory = tmp_path / "allowed" / "sql"
    write_adapter(directory, 4)
    return directory


def write_adapter(directory: Path, rank: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(f'{{"r": {rank}}}')
    (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes())


def allow(door: Door, directory: Path) -> None:
    door.front.puller = Puller(door.front.library, SourcePolicy(roots=(directory,)))


async def load(door: Door, name: Any, path: Any, **fields: Any) -> httpx.Response:
    return await door.client.post(LOAD, json={"lora_name": name, "lora_path": str(path), **fields})


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (answer.status_code, None)
    return answer.status_code, error["type"], error["message"]


def test_an_adapter_is_loaded_and_unloaded_in_vllms_words(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql.parent)
        loaded = await load(door, "sql", sql)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
        assert door.front.engine.loaded, "it is on the device"
        assert (await door.generate(adapter="sql")).headers["x-adapter-version"] == "1"
        unloaded = await door.client.post(UNLOAD, json={"lora_name": "sql"})
        assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
        assert (await door.generate(adapter="sql")).status_code == 404
        assert (await load(door, "sql", sql)).status_code == 200

    visit(test, **OPEN)


def test_refusals_are_vllms(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql.parent)
        missing = "Both 'lora_name' and 'lora_path' must be provided."
        for body in ({}, {"lora_name": "sql"}, {"lora_path": str(sql)}, {"lora_name": "", "lora_path": str(sql)}):
            assert error_of(await door.client.post(LOAD, json=body)) == (400, "InvalidUserInput", missing)
        base = "The lora adapter 'tiny' conflicts with a served base model."
        assert error_of(await load(door, "tiny", sql)) == (400, "InvalidUserInput", base)
        await load(door, "sql", sql)
        again = (
            "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
        assert error_of(await load(door, "sql", sql)) == (400, "InvalidUserInput", again)
        assert error_of(await load(door, "poet", sql.parent / "poet"))[:2] == (404, "NotFoundError")
        assert error_of(await load(door, "../x", sql))[:2] == (400, "InvalidUserInput")
        unnamed = "'lora_name' needs to be provided to unload a LoRA adapter."
        assert error_of(await door.client.post(UNLOAD, json={})) == (400, "InvalidUserInput", unnamed)
        unknown = "The lora adapter 'nobody' cannot be found."
        answer = await door.client.post(UNLOAD, json={"lora_name": "nobody"})
        assert error_of(answer) == (404, "NotFoundError", unknown)
        assert error_of(await door.client.post(LOAD, content=b"{"))[:2] == (400, "Bad Request")
        assert error_of(await load(door, 7, sql))[:2] == (400, "Bad Request")

    visit(test, **OPEN, served_model_name=["tiny"])


def test_in_place_makes_a_version_that_the_name_means(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql.parent)
        await load(door, "sql", sql)
        write_adapter(sql, 8)
        held = await door.front.library.resolve("sql")
        assert (await load(door, "sql", sql, load_inplace=True)).status_code == 200
        assert (await door.generate(adapter="sql")).headers["x-adapter-version"] == "2"
        assert held.version.version == 1, "running requests end on the version they began with"
        held.release()

    visit(test, **OPEN)


def test_equal_loads_at_the_same_time_are_one(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql.parent)
        answers = await asyncio.gather(*(load(door, "sql", sql) for _ in range(5)))
        assert [answer.status_code for answer in answers] == [200] * 5
        versions = (await door.client.get("/admin/v1/adapters/sql/versions")).json()["data"]
        assert len(versions) == 1

    visit(test, **OPEN)


def test_a_key_that_does_not_see_the_adapter_joins_no_load(visit: Visit, sql: Path, tmp_path: Path) -> None:
    keys = make_keys(
        tmp_path / "keys.json",
        owner={"scopes": ["admin"], "adapters": ["sql"]},
        other={"scopes": ["admin"], "adapters": ["bi/*"]},
    )

    async def test(door: Door) -> None:
        gate = asyncio.Event()

        async def slowly(*arguments: Any, **options: Any) -> Any:
            await gate.wait()
            return await door.front.library.register(AdapterDirectory("sql", sql))

        door.front.puller.pull = slowly  # type: ignore[method-assign]
        body = {"lora_name": "sql", "lora_path": "org/sql"}
        first = asyncio.create_task(door.client.post(LOAD, json=body, headers=of("owner")))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(door.client.post(LOAD, json=body, headers=of("other")))
        await asyncio.sleep(0.05)
        gate.set()
        assert (await first).status_code == 200
        assert error_of(await second)[:2] == (404, "NotFoundError")

    visit(test, **OPEN, keys_file=keys)


def test_of_different_loads_under_one_name_one_wins(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql.parent)
        write_adapter(sql.parent / "other", 8)
        answers = await asyncio.gather(load(door, "sql", sql), load(door, "sql", sql.parent / "other"))
        assert sorted(answer.status_code for answer in answers) == [200, 400]

    visit(test, **OPEN)


def test_what_cannot_be_loaded_is_told_and_not_kept(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql.parent)
        status, kind, message = error_of(await load(door, "broken", sql))
        assert (status, kind, "cut short" in message) == (500, "InternalServerError", True)
        (sql / "adapter_config.json").write_text('{"use_strange": true}')
        answer = await load(door, "strange", sql)
        assert (error_of(answer)[0], answer.headers["x-should-retry"]) == (500, "false")
        assert (await door.client.get("/admin/v1/adapters")).json()["data"] == []
        assert door.leftovers() == []

    visit(test, **OPEN)


def test_a_path_outside_of_the_allowed_roots_is_not_read(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql)
        write_adapter(sql.parent / "secret", 4)
        for path in (sql.parent / "secret", sql / ".." / "secret"):
            assert (await load(door, "x", path)).status_code in (400, 403, 404)
        assert (await door.client.get("/admin/v1/adapters")).json()["data"] == []

    visit(test, **OPEN)


def test_the_routes_are_not_there_unless_they_are_opened(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        for path in (LOAD, UNLOAD):
            answer = await door.client.post(path, json={"lora_name": "sql", "lora_path": str(sql)})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            assert "--allow-runtime-lora-updating" in answer.json()["error"]["message"]

    visit(test)


def test_the_routes_ask_for_the_admin_key(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql.parent)
        body = {"lora_name": "sql", "lora_path": str(sql)}
        for key, status in ((None, 401), ("user", 403), ("boss", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            assert (await door.client.post(LOAD, json=body, headers=headers)).status_code == status

    visit(test, **OPEN, api_key=[SecretStr("user")], admin_api_key=[SecretStr("boss")])


def test_fields_that_mean_nothing_here_are_told(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql.parent)
        answer = await load(door, "sql", sql, is_3d_lora_weight=True, base_model_name=None)
        assert (answer.status_code, answer.headers["x-veneer-ignored-fields"]) == (200, "is_3d_lora_weight")

    visit(test, **OPEN)


def test_loads_and_unloads_are_in_the_audit_log(visit: Visit, sql: Path) -> None:
    async def test(door: Door) -> None:
        allow(door, sql.parent)
        await load(door, "sql", sql)
        await door.client.post(UNLOAD, json={"lora_name": "sql"})
        lines = (await door.client.get("/admin/v1/audit")).json()["data"]
        assert [(line["action"], line["target"]) for line in lines] == [
            ("adapter.delete", "sql"),
            ("adapter.register", "sql@1"),
        ]

    visit(test, **OPEN)


def test_vllms_variable_opens_them() -> None:
    assert read_settings([], {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}).settings.allow_runtime_lora_updating
    both = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VENEER_ALLOW_RUNTIME_LORA_UPDATING": "0"}
    assert not read_settings([], both).settings.allow_runtime_lora_updating
