"""One archive, one adapter: `PUT /admin/v1/adapters/{name}`, with its flags and conditions."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.api.conftest import Door, Visit, safetensors_bytes
from tests.api.fake_server import FakeServer

URL = "/admin/v1/adapters/"


def files(config: bytes = b'{"r": 4}') -> dict[str, bytes]:
    return {"adapter_config.json": config, "adapter_model.safetensors": safetensors_bytes()}


def tarred(given: dict[str, bytes], mode: str = "w:gz", folder: str = "") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in given.items():
            entry = tarfile.TarInfo(folder + name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def zipped(given: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in given.items():
            archive.writestr(name, data)
    return packed.getvalue()


async def put(door: Door, name: str = "sql", body: bytes | None = None, **options: Any) -> httpx.Response:
    return await door.client.put(URL + name, content=tarred(files()) if body is None else body, **options)


async def show(door: Door, name: str = "sql") -> dict[str, Any]:
    found: dict[str, Any] = (await door.client.get(URL + name)).json()
    return found


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (tarred(files(), "w"), "application/x-tar"),
        (tarred(files()), "application/gzip"),
        (tarred(files()), "application/x-tar"),
        (tarred(files(), folder="./out/sql/"), ""),
        (zipped(files()), "application/zip"),
        (zipped(files()), "application/octet-stream"),
    ],
)
def test_an_archive_becomes_the_version_that_a_form_makes(visit: Visit, body: bytes, kind: str) -> None:
    async def test(door: Door) -> None:
        answer = await put(door, "org/sql", body, headers={"content-type": kind})
        assert answer.status_code == 201
        assert answer.headers["location"] == URL + "org/sql/versions/1"
        assert answer.headers["etag"] == f'"{door.front.library.catalog.record("org/sql").etag}"'
        by_form = await door.upload("org/sql")
        assert (by_form.status_code, by_form.json()["digest"]) == (200, answer.json()["digest"])
        assert (await door.generate(parameters={"adapter_id": "org/sql"})).headers["x-adapter-version"] == "1"
        assert door.leftovers() == []

    visit(test)


def test_a_slash_in_a_name_may_be_encoded(visit: Visit) -> None:
    async def test(door: Door) -> None:
        assert (await put(door, "org%2Fsql")).json()["name"] == "org/sql"

    visit(test)


def test_known_content_makes_no_new_version_and_is_promoted_unless_told_otherwise(visit: Visit) -> None:
    async def test(door: Door) -> None:
        first, second = tarred(files()), zipped(files(b'{"r": 8}'))
        assert [(await put(door, body=body)).status_code for body in (first, second, first)] == [201, 201, 200]
        assert (await show(door))["aliases"]["default"] == 1
        again = await put(door, "sql?promote=false", second)
        assert (again.status_code, again.json()["version"]) == (200, 2)
        assert (await show(door))["aliases"]["default"] == 1
        assert (await show(door))["latest_version"] == 2

    visit(test)


def test_a_version_that_is_not_promoted_takes_its_alias(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await put(door)
        await put(door, "sql?promote=false&alias=canary", tarred(files(b'{"r": 8}')))
        assert (await show(door))["aliases"] == {"default": 1, "canary": 2}

    visit(test)


def test_a_dry_run_tells_the_report_and_keeps_nothing(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await put(door, "sql?dry_run=true")
        assert answer.status_code == 200
        assert answer.json()["object"] == "adapter.check"
        assert answer.json()["report"]["ranks"] == [4]
        assert (await door.client.get(URL + "sql")).status_code == 404
        assert door.leftovers() == []
        assert list((door.root / "blobs" / "sha256").iterdir()) == []
        refused = await put(door, "sql?dry_run=true", tarred(files(b'{"use_strange": true}')))
        assert refused.json()["error"]["code"] == "unsupported_adapter"

    visit(test)


def test_what_an_operating_system_added_is_left_out_and_told(visit: Visit) -> None:
    async def test(door: Door) -> None:
        added = {"._adapter_config.json": b"x", "__MACOSX/._README.md": b"y", ".DS_Store": b"z"}
        answer = await put(door, body=zipped({**added, **files()}))
        assert answer.status_code == 201
        assert answer.headers["x-veneer-left-out"] == "'._adapter_config.json', '__MACOSX/._README.md', '.DS_Store'"
        assert [file["path"] for file in answer.json()["files"]] == sorted(files())
        assert "x-veneer-left-out" not in (await put(door)).headers

    visit(test)


def test_only_who_saw_the_adapter_as_it_is_changes_it(visit: Visit) -> None:
    async def test(door: Door) -> None:
        async def status(body: bytes, **headers: str) -> int:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return (await put(door, body=body, headers=named)).status_code

        one, two, three = (tarred(files(b'{"r": %d}' % rank)) for rank in (1, 2, 3))
        assert await status(one, if_match="*") == 412
        assert await status(one, if_none_match="*") == 201
        tag = (await put(door, body=one)).headers["etag"]
        assert await status(two, if_none_match="*") == 412
        assert await status(two, if_none_match=tag) == 412
        assert await status(two, if_match='"another"') == 412
        assert await status(two, if_match=f'"another", W/{tag}') == 201
        assert await status(three, if_match=tag) == 412
        assert await status(three, if_match="*") == 201
        form = await door.client.post(URL[:-1], files=door.parts("sql"), headers={"if-none-match": "*"})
        assert (form.status_code, form.json()["error"]["code"]) == (412, "precondition_failed")
        assert (await show(door))["latest_version"] == 3
        assert door.leftovers() == []

    visit(test)


def test_of_two_uploads_on_the_same_condition_one_is_committed(visit: Visit) -> None:
    async def test(door: Door) -> None:
        tag = (await put(door)).headers["etag"]
        bodies = [tarred(files(b'{"r": %d}' % rank)) for rank in range(1, 4)]
        answers = await asyncio.gather(*[put(door, body=body, headers={"if-match": tag}) for body in bodies])
        assert sorted(answer.status_code for answer in answers) == [201, 412, 412]
        assert (await show(door))["latest_version"] == 2

    visit(test)


def test_announced_digests_of_the_body_are_held_against_it(visit: Visit) -> None:
    async def test(door: Door) -> None:
        body = tarred(files())
        right = base64.b64encode(hashlib.sha256(body).digest()).decode()
        long = base64.b64encode(hashlib.sha512(body).digest()).decode()
        for headers in (
            {"repr-digest": f"sha-256=:{right}:"},
            {"digest": f"SHA-256={right}"},
            {"content-digest": f"sha-512=:{long}:, unknown=:AA==:"},
        ):
            assert (await put(door, body=body, headers=headers)).status_code in (200, 201)
        wrong = await put(door, body=body + bytes(512), headers={"repr-digest": f"sha-256=:{right}:"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "digest_mismatch")
        form = await door.client.post(URL[:-1], files=door.parts("x"), headers={"digest": f"sha-256={right}"})
        assert (form.status_code, form.json()["error"]["code"]) == (400, "digest_mismatch")
        assert door.leftovers() == []

    visit(test)


@pytest.mark.parametrize("free", [0, 5_000])
def test_a_disk_without_room_is_507_before_anything_is_sent(
    visit: Visit, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    async def test(door: Door) -> None:
        await put(door)
        before = await show(door)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        weights = bytes(6_000)
        for answer in (
            await put(door, body=tarred(files() | {"tokenizer.model": weights}, "w")),
            await door.client.post(URL[:-1], files=[*door.parts("sql"), ("files", ("tokenizer.model", weights))]),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
        monkeypatch.undo()
        assert await show(door) == before
        assert door.leftovers() == []

    visit(test)


def test_a_disk_that_has_room_for_the_archive_only_is_507(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(door: Door) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
        answer = await put(door, body=tarred(files() | {"tokenizer.model": bytes(200_000)}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
        assert door.leftovers() == []

    visit(test)


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("tar") is None, reason="needs curl and tar")
def test_curl_sends_what_tar_packs(tmp_path: Path) -> None:
    """The two lines of the module's docstring, as a person types them."""
    adapter = tmp_path / "out" / "sql"
    adapter.mkdir(parents=True)
    for name, data in files().items():
        (adapter / name).write_bytes(data)
    subprocess.run(["tar", "czf", "sql.tar.gz", "-C", "out/sql", *files()], cwd=tmp_path, check=True)
    subprocess.run(["tar", "cf", "folder.tar", "out"], cwd=tmp_path, check=True)
    with FakeServer(tmp_path / "store") as server:
        for archive, status in (("sql.tar.gz", "201"), ("folder.tar", "200")):
            command = ["curl", "-s", "-o", "answer", "-w", "%{http_code}", "-T", archive, f"{server.url}{URL}sql"]
            told = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
            assert told.stdout == status, (tmp_path / "answer").read_text()
