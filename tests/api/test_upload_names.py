"""Any name at all in the path of an upload, however it is written: refused, or exactly that adapter."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from adapters_store.errors import InvalidName
from adapters_store.names import check_name
from tests.adapters_store.hostile.packing import sound_tar
from tests.api.fake_server import FakeServer

PIECES = st.sampled_from(
    ["sql", "org", "a", "..", ".", "/", "%2F", "%2f", "%252F", "%5C", "\\", "%00", "%2e", "@3", "versions", "aliases",
     "load", "é", "e\u0301", "\uff21", "\u202e", "\u2215", "\u0661", "%C0%AF", "%FF", "~", "-", "_", " ", "%20", ";"]
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("names")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[FakeServer]:
    with FakeServer(home / "one" / "two" / "store") as running:
        assert httpx.get(running.url + "/health", timeout=20).status_code == 200
        yield running


@example("org/sql")
@example("org%2Fsql")
@example("..%2F..%2Fx")
@example("%2e%2e%2fx")
@given(st.lists(PIECES, min_size=1, max_size=5).map("".join) | st.text(max_size=20))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_in_a_path_is_refused_or_is_that_adapter(server: FakeServer, home: Path, written: str) -> None:
    path = quote(written.encode("utf-8", "surrogatepass"), safe="%/@;~-_.")
    meant = unquote(path, errors="replace")
    status, told = put(server, path)
    if is_name(meant):
        assert status in (200, 201)
        assert told["name"] == meant
        clean = httpx.delete(server.url + "/admin/v1/adapters/" + meant)
        assert clean.is_success
    else:
        assert status in (404, 405, 422), told
    outside = [path for path in home.rglob("*") if "store" not in path.relative_to(home).parts]
    assert sorted(path.name for path in outside) == ["one", "two"]


def test_known_names_are_taken_and_known_tricks_are_not() -> None:
    assert [is_name(name) for name in ("sql", "org/sql", "a..b", "../x", "caf\u00e9")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def put(server: FakeServer, path: str) -> tuple[int, dict[str, object]]:
    """With the path as it is written: http.client changes nothing about it."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.request("PUT", "/admin/v1/adapters/" + path, sound_tar())
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def is_name(text: str) -> bool:
    try:
        return check_name(text) == text
    except InvalidName:
        return False
