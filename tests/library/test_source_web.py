"""Web servers as a source: folders over https, and everything that must not be reached that way."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store.errors import MalformedArchive, TooLarge, UnsafeArchive
from server.library.errors import SourceDenied, SourceError, SourceForbidden, SourceNotFound, SourceUnavailable
from server.library.sources.addresses import find_addresses, is_public
from server.library.sources.policy import SourcePolicy
from server.library.sources.reference import parse_source
from server.library.sources.web import WebSource
from tests.library.loopback_web import LoopbackWeb, write_certificate
from tests.library.source_samples import KEPT, MAX_BYTES, adapter_files, open_place

LOOPBACK = (ipaddress.ip_network("127.0.0.1/32"),)
OPEN = SourcePolicy(web_hosts=("localhost", "*.test"), web_networks=(*LOOPBACK, ipaddress.ip_network("::1/128")))
NOT_PUBLIC = [
    "127.0.0.1", "127.8.9.10", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "192.0.0.8", "192.88.99.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1",
    "::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1",
    "64:ff9b::127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a00:1::1", "2001::1",
    "2001:db8::1", "2001:10::1", "3fff::1", "fec0::1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::1"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificate(tmp_path_factory.mktemp("tls") / "loopback.pem")


@pytest.fixture
def web(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackWeb]:
    """A server with an adapter under /sql/ whose certificate is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with LoopbackWeb(certificate, {f"/sql/{name}": content for name, content in adapter_files().items()}) as server:
        yield server


def pull(tmp_path: Path, uri: str, policy: SourcePolicy = OPEN, token: str | None = None) -> Any:
    """The version that it became; nothing may be left of a failure."""

    async def inside() -> Any:
        async with open_place(tmp_path / "store", policy) as place:
            try:
                return (await place.puller.pull(uri, "sql", token=token)).version
            except Exception:
                assert place.is_untouched()
                raise

    return asyncio.run(inside())


def packed(name: str, files: dict[str, bytes]) -> bytes:
    """An archive of the kind that its name says."""
    buffer = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz" if name.endswith("gz") else "w") as archive_of_tape:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive_of_tape.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def answer_of(*addresses: str) -> list[Any]:
    return [(2, 1, 6, "", (address, 443)) for address in addresses]


def test_a_folder_of_a_web_server(tmp_path: Path, web: LoopbackWeb) -> None:
    web.headers["ETag"] = '"one"'
    version = pull(tmp_path, f"https://localhost:{web.port}/sql")
    assert [file.path for file in version.files] == KEPT
    assert version.source.uri == f"https://localhost:{web.port}/sql/"
    assert version.source.stamp[KEPT[0]] == [version.files[0].size, '"one"']
    assert {token for _, _, token in web.asked} == {None}


@pytest.mark.parametrize("kind", ["sql.tgz", "sql.tar", "sql.zip"])
def test_an_archive_of_a_web_server(tmp_path: Path, web: LoopbackWeb, kind: str) -> None:
    web.files[f"/{kind}"] = packed(kind, {f"sql/{name}": adapter_files()[name] for name in KEPT})
    version = pull(tmp_path, f"https://localhost:{web.port}/{kind}")
    assert [file.path for file in version.files] == KEPT
    assert version.source.uri == f"https://localhost:{web.port}/{kind}"
    assert len(web.asked) == 2


def test_an_archive_that_climbs_or_is_none_leaves_nothing(tmp_path: Path, web: LoopbackWeb) -> None:
    web.files["/up.tar"] = packed("up.tar", {"../adapter_config.json": b"{}"})
    web.files["/none.zip"] = b"nothing of the kind"
    for name, kind in (("up.tar", UnsafeArchive), ("none.zip", MalformedArchive), ("gone.tgz", SourceNotFound)):
        with pytest.raises(kind):
            pull(tmp_path, f"https://localhost:{web.port}/{name}")


def test_it_is_closed_unless_it_was_opened_for_the_host(tmp_path: Path, web: LoopbackWeb) -> None:
    for policy in (SourcePolicy(), SourcePolicy(web_hosts=("models.example",), web_networks=LOOPBACK)):
        with pytest.raises(SourceForbidden, match="--https-sources"):
            pull(tmp_path, f"https://localhost:{web.port}/sql/", policy)
    assert web.asked == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]"])
def test_an_open_host_with_a_private_address_stays_closed(tmp_path: Path, web: LoopbackWeb, host: str) -> None:
    with pytest.raises(SourceForbidden, match="not public"):
        pull(tmp_path, f"https://{host}:{web.port}/sql/", SourcePolicy(web_hosts=("*",)))
    assert web.asked == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "017700000001", "127.1"])
def test_other_spellings_of_a_private_address_are_its_address(tmp_path: Path, web: LoopbackWeb, host: str) -> None:
    with pytest.raises((SourceForbidden, SourceUnavailable)):
        pull(tmp_path, f"https://{host}:{web.port}/sql/", SourcePolicy(web_hosts=("*",)))
    assert web.asked == []


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_no_private_address_is_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(SourceForbidden):
        find_addresses("h.example", 443, (), lambda host, port: answer_of("1.1.1.1", address))


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
    assert find_addresses("h.example", 443, (), lambda host, port: answer_of(address)) == [address]


def test_the_connection_goes_to_the_address_that_was_judged(web: LoopbackWeb) -> None:
    """Nobody but our own look-up knows `models.test`, so the name is never resolved a second time."""
    asked: list[str] = []

    def lookup(host: str, port: int) -> list[Any]:
        asked.append(host)
        return answer_of("127.0.0.1")

    source = WebSource(parse_source(f"https://models.test:{web.port}/sql/"), OPEN, None, lookup)
    listing = source.list_files()
    assert [file.name for file in listing.files] == KEPT
    assert b"".join(source.read(listing.files[0])) == adapter_files()[KEPT[0]]
    assert len(asked) == len(web.asked)


def test_a_name_that_means_something_else_a_moment_later_gains_nothing(web: LoopbackWeb) -> None:
    answers = iter([answer_of("127.0.0.1")] * 3 + [answer_of("127.0.0.2")] * 50)
    source = WebSource(parse_source(f"https://models.test:{web.port}/sql/"), OPEN, None, lambda *_: next(answers))
    with pytest.raises(SourceForbidden, match="not public"):
        source.list_files()
    assert len(web.asked) == 3


@pytest.mark.parametrize(
    "target",
    [
        "http://localhost:{port}/sql/{name}",
        "https://127.0.0.2:{port}/sql/{name}",
        "https://169.254.169.254/latest/meta-data",
        "https://user:pass@localhost:{port}/sql/{name}",
        "file:///etc/passwd",
        "ftp://localhost/x",
        "//10.0.0.1/x",
        "https://elsewhere.example/x",
    ],
)
def test_a_redirect_leads_nowhere_that_is_not_open_itself(tmp_path: Path, web: LoopbackWeb, target: str) -> None:
    web.redirects[f"/sql/{KEPT[1]}"] = target.format(port=web.port, name=KEPT[1])
    with pytest.raises(SourceForbidden) as caught:
        pull(tmp_path, f"https://localhost:{web.port}/sql/")
    assert "pass" not in str(caught.value).replace("passwd", "")


def test_a_redirect_to_an_open_host_is_followed_without_the_token(web: LoopbackWeb) -> None:
    web.redirects = {f"/sql/{KEPT[1]}": f"https://other.test:{web.port}/store/w?sig=1"}
    web.files["/store/w"] = adapter_files()[KEPT[1]]
    uri = parse_source(f"https://models.test:{web.port}/sql/")
    source = WebSource(uri, OPEN, "tok", lambda *_: answer_of("127.0.0.1"))
    listing = source.list_files()
    assert b"".join(source.read(listing.files[1])) == adapter_files()[KEPT[1]]
    assert {token for _, path, token in web.asked if path.startswith("/store")} == {None}
    assert {token for _, path, token in web.asked if path.startswith("/sql")} == {"Bearer tok"}
    assert any(path == "/store/w?sig=1" for _, path, _ in web.asked)


def test_a_token_opens_what_is_private(tmp_path: Path, web: LoopbackWeb) -> None:
    web.token = "right"
    with pytest.raises(SourceDenied, match="401"):
        pull(tmp_path, f"https://localhost:{web.port}/sql/")
    with pytest.raises(SourceDenied) as caught:
        pull(tmp_path, f"https://localhost:{web.port}/sql/", token="wr0ng")
    assert "wr0ng" not in str(caught.value)
    assert str(pull(tmp_path, f"https://localhost:{web.port}/sql/", token="right")) == "sql@1"


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path, certificate: Path) -> None:
    with LoopbackWeb(certificate, {}) as web, pytest.raises(SourceUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        pull(tmp_path, f"https://localhost:{web.port}/sql/")


def test_failures_on_the_way(tmp_path: Path, web: LoopbackWeb) -> None:
    uri = f"https://localhost:{web.port}/sql/"
    with pytest.raises(SourceNotFound, match=r"holds no adapter_config\.json"):
        pull(tmp_path, f"https://localhost:{web.port}/nothing/")
    web.cut = True
    with pytest.raises(SourceUnavailable):
        pull(tmp_path, uri)
    web.cut, web.replace_after_listing = False, True
    with pytest.raises(SourceUnavailable, match="was replaced"):
        pull(tmp_path, uri)
    web.replace_after_listing = False
    web.headers["Content-Encoding"] = "gzip"
    with pytest.raises(SourceUnavailable, match="encoded"):
        pull(tmp_path, uri)
    web.headers.clear()
    web.redirects = {f"/sql/{KEPT[0]}": f"/sql/{KEPT[0]}"}
    with pytest.raises(SourceUnavailable, match="more than 5 times"):
        pull(tmp_path, uri)
    web.redirects = {}
    web.files[f"/sql/{KEPT[1]}"] = bytes(MAX_BYTES + 1)
    with pytest.raises(TooLarge):
        pull(tmp_path, uri)
    assert ("GET", f"/sql/{KEPT[1]}", None) not in web.asked[-20:]


def test_offline_closes_it(tmp_path: Path, web: LoopbackWeb) -> None:
    policy = SourcePolicy(web_hosts=("*",), web_networks=LOOPBACK, is_offline=True)
    with pytest.raises(SourceError, match="offline"):
        pull(tmp_path, f"https://localhost:{web.port}/sql/", policy)
