"""A disk that is full: 507 from every route that writes, and a store that holds what it held."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import fsck
from tests.api.conftest import Door, Visit, safetensors_bytes
from tests.api.test_archive_uploads import files, tarred

SQL = "/admin/v1/adapters/sql"
POINTS = ("fsync", "replace", "link", "mkdir")
WEIGHTS = safetensors_bytes()
BLOB = "/admin/v1/blobs/sha256:" + hashlib.sha256(WEIGHTS).hexdigest()
CHANGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "form": ("POST", "/admin/v1/adapters", {}),
    "archive": ("PUT", SQL, {"content": tarred(files(b'{"r": 16}'))}),
    "blob": ("PUT", BLOB, {"content": WEIGHTS}),
    "alias": ("PUT", SQL + "/aliases/prod", {"json": {"version": 1}}),
    "rollback": ("POST", SQL + "/aliases/default/rollback", {}),
    "gate": ("PUT", SQL + "/aliases/prod/gate", {"json": {"prompts": [{"inputs": "a"}]}}),
    "canary": ("POST", SQL + "/aliases/default/canary", {"json": {"version": 1}}),
    "attributes": ("PATCH", SQL, {"json": {"description": "x"}}),
    "deletion": ("DELETE", SQL + "/versions/1", {}),
}


@contextmanager
def full_at(point: int, root: Path) -> Iterator[list[str]]:
    """The n-th change below `root` that takes space, and every later one, finds none. Grows by what was tried.

    A name that a rename has given takes no more: to sync its directory does not fail for want of space.
    """
    tried: list[str] = []
    real = {name: getattr(os, name) for name in POINTS}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            where = " ".join(str(one) for one in arguments)
            if name == "fsync":
                where = os.readlink(f"/proc/self/fd/{arguments[0]}")
            if str(root) not in where or "audit.jsonl" in where or (name == "fsync" and Path(where).is_dir()):
                return real[name](*arguments, **options)
            tried.append(name)
            if len(tried) >= point:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real[name](*arguments, **options)

        return call

    for name in POINTS:
        setattr(os, name, wrap(name))
    try:
        yield tried
    finally:
        for name, function in real.items():
            setattr(os, name, function)


async def ask(door: Door, change: str) -> httpx.Response:
    method, path, options = CHANGES[change]
    if change == "form":
        return await door.upload("sql", config=b'{"r": 16}')
    return await door.client.request(method, path, **options)


async def seen(door: Door) -> list[Any]:
    gate = await door.client.get(SQL + "/aliases/prod/gate")
    return [(await door.client.get(SQL)).json(), gate.json(), (await door.client.head(BLOB)).status_code]


@pytest.mark.parametrize("change", CHANGES)
def test_a_full_disk_is_507_and_changes_nothing(visit: Visit, change: str) -> None:
    async def test(door: Door) -> None:
        for rank in (1, 2):
            await door.upload("sql", config=b'{"r": %d}' % rank)
        before = await seen(door)
        for point in range(1, 100):
            with full_at(point, door.root) as tried:
                answer = await ask(door, change)
            if len(tried) < point:
                break  # there were fewer changes than that: none failed
            if answer.status_code < 300:  # what failed came after the change, and is settled later
                assert (await seen(door)) != before, (point, tried)
                break
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full"), (point, tried)
            assert await seen(door) == before, (point, tried)
            assert door.leftovers() == [], (point, tried)
        assert answer.status_code < 300, answer.text
        assert point > 1, "the control: some change of the disk failed"
        assert (await seen(door)) != before

    visit(test)


def test_a_store_that_met_a_full_disk_is_sound(visit: Visit, tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        await door.upload("sql")
        for point in (1, 3, 5, 7, 9, 11):
            with full_at(point, door.root):
                await ask(door, "form")
                await ask(door, "attributes")
                await ask(door, "alias")

    visit(test)
    assert [finding for finding in fsck.check(tmp_path / "store").findings if finding.code != "blob_stray"] == []
