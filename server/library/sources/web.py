"""Folders and archives on web servers, by https and only where the operator opened it.

A server of this kind lists nothing, so the names that an adapter's files can have are asked for one by one; an address
that ends as an archive's name does is one file with all of them in it. Every
connection is made to an address that was judged (see `addresses`), by us and through no proxy; a redirect is a new
address to judge, and takes no token along.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from adapters_store.record import Source
from adapters_store.staging import ALLOWED_FILES
from server.library.errors import SourceDenied, SourceForbidden, SourceInvalid, SourceNotFound, SourceUnavailable
from server.library.sources.addresses import Resolve, find_addresses, resolve
from server.library.sources.listing import CHUNK_BYTES, STALL_S, Listing, SourceFile, choose_files
from server.library.sources.policy import SourcePolicy
from server.library.sources.reference import Scheme, SourceReference, parse_source

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_ABSENT = (404, 410)
_NAMES = (*(name.replace("*", "") for name in ALLOWED_FILES), "tokenizer_config.json", "adapter_model.bin")


class Found(NamedTuple):
    """The answer about one file."""

    size: int | None
    tag: str | None  # its entity tag, else when it was last changed


class WebSource:
    def __init__(
        self, reference: SourceReference, policy: SourcePolicy, token: str | None = None, lookup: Resolve = resolve
    ) -> None:
        """Raises SourceForbidden where https:// is closed, or closed for this host."""
        self._is_archive = reference.place.lower().endswith(_ARCHIVES)
        is_complete = self._is_archive or reference.place.endswith("/")
        self._place = reference.place if is_complete else reference.place + "/"
        self._policy = policy
        self._token = token
        self._lookup = lookup
        self._tls = ssl.create_default_context()
        self._stamp: dict[str, list[object]] = {}
        self._require_open(_host(self._place))

    def list_files(self) -> Listing:
        """Raises SourceError, FileRefused."""
        if self._is_archive:
            return self._list_archive()
        found = []
        for name in dict.fromkeys(_NAMES):
            answer = self._ask(self._place + name)
            if answer is not None:
                found.append(SourceFile(name, self._place + name, answer.size))
                self._stamp[name] = [answer.size, answer.tag]
        files = choose_files(found, self._place)
        return Listing(files, Source(self._place, None, {file.name: self._stamp[file.name] for file in files}))

    def read(self, file: SourceFile) -> Iterator[bytes]:
        """Raises SourceError; also where the file is not any more what was listed."""
        num_read = 0
        with self._open("GET", file.key) as answer:
            if answer.status != 200:
                raise _refused(answer.status, file.key)
            now = _facts(answer)
            if [now.size, now.tag] != self._stamp[file.name]:
                raise SourceUnavailable(f"{file.key} was replaced while it was fetched; try again.")
            while chunk := _read(answer, file.key):
                num_read += len(chunk)
                yield chunk
        if file.size is not None and num_read != file.size:
            raise SourceUnavailable(f"{num_read} of the {file.size} bytes of {file.key} came; try again.")

    def _list_archive(self) -> Listing:
        name = self._place.rpartition("/")[2]
        answer = self._ask(self._place)
        if answer is None:
            raise SourceNotFound(f"there is nothing at {self._place}.")
        self._stamp[name] = [answer.size, answer.tag]
        archive = SourceFile(name, self._place, answer.size)
        return Listing((), Source(self._place, None, dict(self._stamp)), archive)

    def _ask(self, url: str) -> Found | None:
        with self._open("HEAD", url) as answer:
            if answer.status in _ABSENT:
                return None
            if answer.status != 200:
                raise _refused(answer.status, url)
            return _facts(answer)

    @contextlib.contextmanager
    def _open(self, method: str, url: str) -> Iterator[http.client.HTTPResponse]:
        """One request and where it is redirected to. Raises SourceError."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "veneer"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        for _ in range(_MAX_REDIRECTS + 1):
            connection = self._connect(url)
            try:
                answer = _send(connection, method, url, headers)
                if answer.status not in _REDIRECTS:
                    yield answer
                    return
                target = _target(url, answer.getheader("Location"))
                if _host(target) != _host(url):
                    headers.pop("Authorization", None)
                url = target
            finally:
                connection.close()
        raise SourceUnavailable(f"{self._place} redirects more than {_MAX_REDIRECTS} times.")

    def _connect(self, url: str) -> http.client.HTTPSConnection:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
        self._require_open(host)
        addresses = find_addresses(host, port, self._policy.web_networks, self._lookup)
        return _PinnedConnection(host, port, addresses, self._tls)

    def _require_open(self, host: str) -> None:
        if not self._policy.takes_host(host):
            raise SourceForbidden(
                f"this server fetches nothing by https from {host!r}. Upload the adapter, or start the server with "
                "--https-sources naming the host."
            )


class _PinnedConnection(http.client.HTTPSConnection):
    """To one of the addresses and no other, under the host's own name and certificate."""

    def __init__(self, host: str, port: int, addresses: list[str], tls: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=STALL_S, context=tls)
        self._addresses = addresses
        self._tls = tls

    def connect(self) -> None:
        plain = self._reach()
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise

    def _reach(self) -> socket.socket:
        for address in self._addresses[:-1]:
            with contextlib.suppress(OSError):
                return socket.create_connection((address, self.port), self.timeout)
        return socket.create_connection((self._addresses[-1], self.port), self.timeout)


def _send(
    connection: http.client.HTTPSConnection, method: str, url: str, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(method, path, headers=dict(headers))
        return connection.getresponse()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise SourceUnavailable(f"no answer from {parts.hostname}: {error}") from error


def _read(answer: http.client.HTTPResponse, url: str) -> bytes:
    try:
        return answer.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise SourceUnavailable(f"{url} broke off: {error}") from error


def _facts(answer: http.client.HTTPResponse) -> Found:
    if answer.getheader("Content-Encoding", "identity") != "identity":
        raise SourceUnavailable("the web server sends its files encoded; it must send them as they are.")
    length = answer.getheader("Content-Length")
    size = int(length) if length is not None and length.isascii() and length.isdigit() else None
    return Found(size, answer.getheader("ETag") or answer.getheader("Last-Modified"))


def _target(url: str, location: str | None) -> str:
    """Where a redirect leads; the same grammar holds there."""
    shown = url.partition("?")[0]  # a query may be a signature
    if location is None:
        raise SourceUnavailable(f"{shown} redirects to nowhere.")
    try:
        target = urljoin(url, location)
        reference = parse_source(target.partition("?")[0])
    except (ValueError, SourceInvalid) as error:
        raise SourceForbidden(f"{shown} redirects to where nothing is fetched from: {error}") from error
    if reference.scheme is not Scheme.WEB:
        raise SourceForbidden(f"{shown} redirects to something else than https.")
    return target


def _refused(status: int, url: str) -> SourceNotFound | SourceDenied | SourceUnavailable:
    if status in _ABSENT:
        return SourceNotFound(f"there is nothing at {url}.")
    if status in (401, 403):
        return SourceDenied(f"the web server does not hand out {url} (status {status}); send a `token` that it knows.")
    return SourceUnavailable(f"the web server answered {status} for {url}.")


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""
