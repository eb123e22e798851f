"""Uploads: what is taken, what is refused with which code, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.api.conftest import Door, Visit, safetensors_bytes

WEIGHTS = ("files", ("adapter_model.safetensors", safetensors_bytes()))
CUT_SHORT = safetensors_bytes()[:-1]
CONFIG = ("files", ("adapter_config.json", b"{}"))


def meta(**fields: Any) -> tuple[str, tuple[None, str]]:
    return ("metadata", (None, json.dumps({"name": "x", **fields})))


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([CONFIG, WEIGHTS], 422, "invalid_upload"),
        ([CONFIG, meta(), WEIGHTS], 422, "invalid_upload"),
        ([meta(), meta(), CONFIG, WEIGHTS], 422, "invalid_upload"),
        ([meta(), ("other", (None, "x")), CONFIG, WEIGHTS], 422, "invalid_upload"),
        ([meta(surprise=1), CONFIG, WEIGHTS], 422, "invalid_upload"),
        ([meta(name="a,b"), CONFIG, WEIGHTS], 422, "invalid_name"),
        ([meta(name="../../etc"), CONFIG, WEIGHTS], 422, "invalid_name"),
        ([meta(alias="latest"), CONFIG, WEIGHTS], 422, "invalid_name"),
        ([("metadata", (None, "{nonsense")), CONFIG, WEIGHTS], 422, "invalid_upload"),
        ([("metadata", (None, "{" + " " * 70_000 + "}")), CONFIG, WEIGHTS], 413, "too_large"),
        ([meta(), CONFIG], 422, "missing_file"),
        ([meta(), CONFIG, CONFIG, WEIGHTS], 422, "file_refused"),
        ([meta(), CONFIG, ("files", ("adapter_model.bin", b"x"))], 422, "file_refused"),
        ([meta(), CONFIG, ("files", ("../adapter_model.safetensors", b"x"))], 422, "file_refused"),
        ([meta(), CONFIG, ("files", ("adapter_model.safetensors", b"x"))], 422, "invalid_safetensors"),
        ([meta(), CONFIG, ("files", ("adapter_model.safetensors", CUT_SHORT))], 422, "invalid_safetensors"),
        ([meta(), ("files", ("adapter_config.json", b"no json")), WEIGHTS], 422, "invalid_config"),
        ([meta(), ("files", ("adapter_config.json", b'{"use_strange": true}')), WEIGHTS], 422, "unsupported_adapter"),
        ([meta(), ("files", ("adapter_config.json", b'{"r": 512}')), WEIGHTS], 422, "rank_too_large"),
        ([meta(), ("files", ("adapter_config.json", b"a" * 1_000_001)), WEIGHTS], 413, "too_large"),
        ([meta(files=[{"path": "adapter_config.json", "sha256": "0" * 64}]), CONFIG, WEIGHTS], 400, "digest_mismatch"),
        ([meta(), *[("files", (f"tokenizer{i}.json", b"")) for i in range(70)]], 413, "too_large"),
    ],
)
def test_a_bad_upload_is_refused_with_its_code_and_leaves_nothing(
    visit: Visit, parts: list[Any], status: int, code: str
) -> None:
    async def test(door: Door) -> None:
        answer = await door.client.post("/admin/v1/adapters", files=parts)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert (await door.client.get("/admin/v1/adapters")).json()["data"] == []
        assert door.leftovers() == []

    visit(test)


def test_announced_digests_are_held_against_the_bytes(visit: Visit) -> None:
    async def test(door: Door) -> None:
        digest = "sha256:" + hashlib.sha256(b"{}").hexdigest()
        good: list[Any] = [meta(files=[{"path": "adapter_config.json", "sha256": digest}]), CONFIG, WEIGHTS]
        assert (await door.client.post("/admin/v1/adapters", files=good)).status_code == 201

    visit(test)


def test_creating_what_exists_is_409_when_only_new_is_wanted(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        answer = await door.upload("pirate", config=b'{"r": 8}', if_exists="error")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_exists")
        checked: list[Any] = [meta(name="pirate", if_exists="error"), CONFIG, WEIGHTS]
        answer = await door.client.post("/admin/v1/adapters?dry_run=true", files=checked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_exists")
        checked[0] = meta(name="new", if_exists="error")
        assert (await door.client.post("/admin/v1/adapters?dry_run=true", files=checked)).status_code == 200

    visit(test)


def test_other_content_types_are_told_what_to_send(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for kind in ("multipart/form-data", "text/plain", ""):
            answer = await door.client.post("/admin/v1/adapters", content=b"{}", headers={"content-type": kind})
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")

    visit(test)


@pytest.mark.parametrize("length", [0, 1, 40, 200, 500])
def test_a_body_that_is_cut_short_is_refused(visit: Visit, length: int) -> None:
    async def test(door: Door) -> None:
        request = door.client.build_request("POST", "/admin/v1/adapters", files=door.parts("x"))
        content = request.read()[:length]
        headers = {"content-type": request.headers["content-type"]}
        answer = await door.client.post("/admin/v1/adapters", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_multipart")
        assert door.leftovers() == []

    visit(test)


def test_a_body_that_stops_coming_is_dropped(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def slowly() -> AsyncIterator[bytes]:
            yield b"--b\r\n"
            await asyncio.sleep(30)
            yield b"never"

        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = await door.client.post("/admin/v1/adapters", content=slowly(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "upload_stalled")
        assert door.leftovers() == []

    visit(test, stalled_client_s=0.05)


def test_an_upload_over_the_cap_is_413(visit: Visit) -> None:
    async def test(door: Door) -> None:
        epilogue = b"x" * 3_000_000
        request = door.client.build_request("POST", "/admin/v1/adapters", files=door.parts("x"))
        headers = {"content-type": request.headers["content-type"]}
        content = b"preamble" + request.read() + epilogue
        answer = await door.client.post("/admin/v1/adapters", content=content, headers=headers)
        assert answer.status_code in (400, 413)
        assert door.leftovers() == []

    visit(test, max_upload_bytes=1000)


def test_bytes_of_uploads_are_counted(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        assert (
            f"veneer_upload_bytes_total {float(len(safetensors_bytes()) + 8)}"
            in (await door.client.get("/metrics")).text
        )

    visit(test)


def test_an_unknown_field_of_the_metadata_is_named(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.upload("pirate", alais="prod")
        assert answer.status_code == 422
        assert "unknown field `metadata.alais`; there are name, alias," in answer.json()["error"]["message"]
        assert door.leftovers() == []

    visit(test)
