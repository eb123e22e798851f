"""Files sent ahead by their digest, and uploads that name them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from tests.api.conftest import Door, Visit, safetensors_bytes

CONFIG, WEIGHTS = b'{"r": 4}', safetensors_bytes()
BLOBS = "/admin/v1/blobs/sha256:"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def send(door: Door, data: bytes, digest: str | None = None) -> httpx.Response:
    return await door.client.put(BLOBS + (digest or sha256(data)), content=data)


async def name_files(door: Door, files: dict[str, bytes], *sent: str) -> httpx.Response:
    """An upload that lists all files and sends those in `sent`."""
    listed = [{"path": path, "sha256": "sha256:" + sha256(data)} for path, data in files.items()]
    parts: list[Any] = [("metadata", (None, json.dumps({"name": "sql", "files": listed})))]
    parts += [("files", (path, files[path])) for path in sent]
    return await door.client.post("/admin/v1/adapters", files=parts)


FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}


def test_a_file_is_asked_for_sent_once_and_named(visit: Visit) -> None:
    async def test(door: Door) -> None:
        place = BLOBS + sha256(WEIGHTS)
        assert (await door.client.head(place)).status_code == 404
        assert (await send(door, WEIGHTS)).status_code == 201
        assert (await send(door, WEIGHTS)).status_code == 200
        asked = await door.client.head(place)
        assert (asked.status_code, asked.headers["content-length"]) == (200, str(len(WEIGHTS)))
        answer = await name_files(door, FILES, "adapter_config.json")
        assert answer.status_code == 201
        assert {file["path"]: file["digest"] for file in answer.json()["files"]} == {
            path: "sha256:" + sha256(data) for path, data in FILES.items()
        }
        assert (await door.client.post(BLOBS + sha256(CONFIG), content=CONFIG)).status_code == 201
        assert (await name_files(door, FILES)).status_code == 200, "all of it by digest"
        assert (await door.generate(parameters={"adapter_id": "sql"})).status_code == 200
        assert door.leftovers() == []

    visit(test)


def test_an_order_names_blobs_as_its_source(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def order(**source: Any) -> httpx.Response:
            body = {"name": "sql", "source": source, "alias": "prod"}
            return await door.client.post("/admin/v1/adapters?wait=20", json=body)

        named = {path: "sha256:" + sha256(data) for path, data in FILES.items()}
        assert (await order(files=named)).json()["error"]["code"] == "blob_not_found"
        for data in FILES.values():
            await send(door, data)
        assert (await order(files=named)).status_code == 201
        assert (await order(files=named)).status_code == 200
        assert (await door.client.get("/admin/v1/adapters/sql")).json()["aliases"] == {"default": 1, "prod": 1}
        assert (await order(files={"../x": named["adapter_config.json"]})).json()["error"]["code"] == "file_refused"
        assert (await order(files={"README.md": "sha256:xyz"})).json()["error"]["code"] == "invalid_name"
        for source in ({"files": named, "uri": "org/x"}, {}, {"files": named, "token": "hf_x"}):
            assert (await order(**source)).json()["error"]["code"] == "invalid_order"
        assert door.leftovers() == []

    visit(test)


def test_an_announced_file_that_is_nowhere_is_refused(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await name_files(door, FILES, "adapter_config.json")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "blob_not_found")
        assert door.leftovers() == []

    visit(test)


def test_a_blob_is_checked_like_any_file_of_an_adapter(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for data in (b"\x80\x04cos\nsystem\n.", WEIGHTS):
            assert (await send(door, data)).status_code == 201
        refused = await name_files(door, {**FILES, "adapter_model.safetensors": b"\x80\x04cos\nsystem\n."}, *FILES)
        assert refused.json()["error"]["code"] == "invalid_safetensors"
        climbing = await name_files(door, {"../adapter_model.safetensors": WEIGHTS})
        assert climbing.json()["error"]["code"] == "file_refused"
        assert door.leftovers() == []

    visit(test)


def test_bytes_of_another_digest_are_not_kept(visit: Visit) -> None:
    async def test(door: Door) -> None:
        wrong = await send(door, WEIGHTS, sha256(CONFIG))
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "digest_mismatch")
        assert (await door.client.head(BLOBS + sha256(CONFIG))).status_code == 404
        for digest in ("../../x", "md5:00", "A" * 64, "0" * 63):
            answer = await door.client.put("/admin/v1/blobs/" + digest.replace("/", "%2F"), content=b"x")
            assert answer.status_code in (404, 422), answer.text
        large = bytes(1_000_001)
        assert (await send(door, large)).status_code == 413
        assert door.leftovers() == []

    visit(test)


def test_a_blob_that_nobody_asks_for_is_gone_after_a_day(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await send(door, WEIGHTS)
        await send(door, CONFIG)
        for data in (WEIGHTS, CONFIG):
            os.utime(door.root / "received" / sha256(data), (time.time() - 25 * 3600,) * 2)
        assert (await door.client.head(BLOBS + sha256(CONFIG))).status_code == 200, "asking keeps it"
        await send(door, b"another")
        assert (await door.client.head(BLOBS + sha256(WEIGHTS))).status_code == 404
        assert (await door.client.head(BLOBS + sha256(CONFIG))).status_code == 200

    visit(test)


def test_a_blob_that_stops_coming_is_dropped(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def slowly() -> AsyncIterator[bytes]:
            yield WEIGHTS[:10]
            await asyncio.sleep(30)
            yield WEIGHTS[10:]

        answer = await door.client.put(BLOBS + sha256(WEIGHTS), content=slowly())
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "upload_stalled")
        assert (await door.client.head(BLOBS + sha256(WEIGHTS))).status_code == 404
        assert door.leftovers() == []

    visit(test, stalled_client_s=0.05)
