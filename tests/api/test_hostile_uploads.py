"""Every member of the committed corpus, sent over a socket to a server: refused with its code, and nothing stays."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store.staging import StageLimits
from server.settings import Settings
from tests.adapters_store.hostile.hostile_member import HERE, HostileMember, archive, read_corpus, upload
from tests.adapters_store.hostile.make_corpus import listing, make_corpus
from tests.adapters_store.hostile.packing import form, sound, sound_tar, sound_zip, zipped
from tests.api.fake_server import FakeServer
from tests.library.library_samples import make_target
from tests.library.local_loader import LocalLoader

LIMITS = StageLimits(2**16, 2**17, reserve_bytes=0, max_config_bytes=2**14)
SETTINGS = Settings(max_upload_bytes=2**17, stalled_client_s=0.4, upload_timeout_s=1.2)
CORPUS = read_corpus()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store lies three folders deep, so that whatever climbs is still found below."""
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[FakeServer]:
    root = home / "one" / "two" / "store"
    with FakeServer(root, SETTINGS, loader=LocalLoader(make_target()), limits=LIMITS) as running:
        wait_until_ready(running)
        yield running


@pytest.mark.parametrize("member", CORPUS, ids=lambda member: member.name)
def test_a_hostile_upload_is_refused_with_its_code_and_leaves_nothing(
    server: FakeServer, home: Path, member: HostileMember
) -> None:
    before = tree(home)
    assert send(server.address, member)[:2] == (member.status, member.code)
    wait_until_equal(home, before)


@pytest.mark.parametrize(
    "member",
    [
        archive("tar", "", sound_tar()),
        archive("tar in a folder", "", sound_tar(folder="./out/sql/")),
        archive("gzip", "", zipped(sound_tar())),
        archive("gzip in parts", "", zipped(sound_tar()[:1000]) + zipped(sound_tar()[1000:])),
        archive("zip", "", sound_zip()),
        upload("form", "", form(sound())),
    ],
    ids=lambda member: member.name,
)
def test_the_same_server_takes_what_is_sound(server: FakeServer, home: Path, member: HostileMember) -> None:
    status, _, body = send(server.address, member)
    assert status in (200, 201), body
    assert (body["version"], body["state"]) == (1, "ready")  # whatever it is packed in, the files are the same
    assert not list(home.glob("one/two/store/staging/*"))


def test_the_corpus_is_large_and_is_what_its_script_makes() -> None:
    made = make_corpus()
    assert len({member.name for member in made}) == len(made) == len(CORPUS) >= 40
    assert (HERE / "corpus.json").read_text() == listing(made)
    assert made == CORPUS
    committed = {path.name for path in (HERE / "members").iterdir()}
    assert committed == {f"{member.name}.bin" for member in made}


def wait_until_ready(server: FakeServer) -> None:
    assert httpx.get(server.url + "/health", timeout=20).status_code == 200


def send(address: tuple[str, int], member: HostileMember) -> tuple[int | None, str | None, Any]:
    """(status, code, body); Nones where no answer came."""
    with socket.create_connection(address, timeout=20) as line:
        line.sendall(head_of(member) + member.body)
        if member.pace == "leaves":
            time.sleep(0.2)  # let it begin
            return None, None, None
        if member.pace == "drips":
            drip(line)
        answer = http.client.HTTPResponse(line, method=member.method)
        answer.begin()
        body = json.loads(answer.read())
        error = body.get("error")
        return answer.status, error["code"] if error else None, body


def head_of(member: HostileMember) -> bytes:
    headers = {"Host": "localhost", "Content-Length": str(len(member.body)), **member.headers}
    lines = [f"{member.method} {member.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def drip(line: socket.socket) -> None:
    """A byte now and then, never late enough to be called stalled, until the other side has had enough."""
    line.settimeout(0.1)
    for _ in range(100):
        try:
            line.sendall(b"\0")
            if line.recv(1, socket.MSG_PEEK):
                break
        except TimeoutError:
            continue
    line.settimeout(20)


def tree(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*")}


def wait_until_equal(home: Path, before: set[str]) -> None:
    """A server removes what it refused before it answers; only who left without waiting is a moment ahead of it."""
    for _ in range(100):
        if tree(home) == before:
            return
        time.sleep(0.02)
    assert tree(home) == before
