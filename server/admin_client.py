"""A thin client of the admin routes, for the command line. Standard library only.

client = AdminClient("http://127.0.0.1:8000", key=None)
client.push("pirate", Path("out/pirate"))
"""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from adapters_store.staging import is_allowed

PREFIX = "/admin/v1"
OnBytes = Callable[[int, int], None]  # (sent, in all)
_CHUNK_BYTES = 256 * 1024


class RequestFailed(Exception):
    """The server said no, or cannot be reached. `status` is None in the latter case."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class AdminClient:
    def __init__(self, url: str, key: str | None, timeout_s: float = 600.0) -> None:
        """Raises ValueError for an address that is not http(s)://host[:port]."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"{url!r} is no server's address; expected one like http://127.0.0.1:8000")
        self._scheme, self._netloc, self._path = parts.scheme, parts.netloc, parts.path.rstrip("/")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout_s = timeout_s

    def list(self, prefix: str = "") -> list[dict[str, Any]]:
        """Every adapter, page by page."""
        found: list[dict[str, Any]] = []
        token: str | None = ""
        while token is not None:
            page = self.call("GET", "/adapters?" + urlencode({"prefix": prefix, "page_token": token, "limit": 500}))
            found += page["data"]
            token = page["next_page_token"]
        return found

    def show(self, name: str) -> dict[str, Any]:
        return self.call("GET", f"/adapters/{quote(name)}")

    def load(self, name: str, version: int | None = None, tier: str = "device") -> dict[str, Any]:
        return self.call("POST", f"/adapters/{quote(name)}/load", {"version": version, "tier": tier})

    def evict(self, name: str, version: int | None = None, tier: str = "device") -> dict[str, Any]:
        return self.call("POST", f"/adapters/{quote(name)}/unload", {"version": version, "tier": tier})

    def delete(self, name: str, version: int | None = None, *, force: bool = False) -> dict[str, Any]:
        """What went: `versions` and `requests_left`."""
        path = f"/adapters/{quote(name)}" + ("" if version is None else f"/versions/{version}")
        _, headers, _ = self._exchange("DELETE", path + ("?force=true" if force else ""), None, {})
        versions = [int(number) for number in headers.get("x-deleted-versions", "").split(",") if number]
        return {"name": name, "versions": versions, "requests_left": int(headers.get("x-requests-left", 0))}

    def alias_path(self, name: str, alias: str) -> str:
        return f"/adapters/{quote(name)}/aliases/{quote(alias)}"

    def push(
        self,
        name: str,
        directory: Path,
        *,
        alias: str | None = None,
        promote: bool = True,
        dry_run: bool = False,
        on_bytes: OnBytes | None = None,
    ) -> dict[str, Any]:
        """Upload the adapter files of a directory; other files in it stay where they are.

        `on_bytes` is told (bytes sent, bytes in all).

        Raises:
            RequestFailed: the server refused it, with its reason.
            OSError: a file cannot be read.
        """
        files = sorted(path for path in directory.iterdir() if path.is_file() and is_allowed(path.name))
        metadata = {"name": name, "alias": alias, "promote": promote}
        boundary = secrets.token_hex(16)
        parts = [(_part_head(boundary, 'name="metadata"'), json.dumps(metadata).encode())]
        heads = [(_part_head(boundary, f'name="files"; filename="{path.name}"'), path) for path in files]
        tail = f"--{boundary}--\r\n".encode()
        num_bytes = sum(len(head) + len(body) + 2 for head, body in parts) + len(tail)
        num_bytes += sum(len(head) + path.stat().st_size + 2 for head, path in heads)
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": str(num_bytes)}
        body = _counted(_multipart(parts, heads, tail), num_bytes, on_bytes)
        return self._send("POST", "/adapters" + ("?dry_run=true" if dry_run else ""), body, headers)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request below the admin prefix. Raises RequestFailed."""
        if body is None:
            return self._send(method, path, None, {})
        return self._send(method, path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        status, _, content = self._exchange(method, path, body, headers)
        return _read(status, content)

    def _exchange(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str]
    ) -> tuple[int, Message, bytes]:
        """One request and its answer; refusals are raised."""
        kind = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        connection = kind(self._netloc, timeout=self._timeout_s)
        try:
            connection.request(method, f"{self._path}{PREFIX}{path}", body, {**self._headers, **headers})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailed(f"no answer from {self._scheme}://{self._netloc}: {error}") from None
        finally:
            connection.close()
        if response.status >= HTTPStatus.BAD_REQUEST:
            _read(response.status, content)
        return response.status, response.headers, content


def _counted(body: Iterator[bytes], total: int, on_bytes: OnBytes | None) -> Iterator[bytes]:
    num_sent = 0
    for chunk in body:
        yield chunk
        num_sent += len(chunk)
        if on_bytes is not None:
            on_bytes(num_sent, total)


def _read(status: int, content: bytes) -> dict[str, Any]:
    if status == HTTPStatus.NO_CONTENT:
        return {}
    try:
        body = json.loads(content)
    except ValueError:
        raise RequestFailed(f"the server answered {status} with something that is no JSON", status) from None
    if status < HTTPStatus.BAD_REQUEST:
        return dict(body)
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        raise RequestFailed(str(error.get("message")), status, error.get("code"))
    raise RequestFailed(str(error), status)


def _part_head(boundary: str, disposition: str) -> bytes:
    return f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()


def _multipart(parts: list[tuple[bytes, bytes]], files: list[tuple[bytes, Path]], tail: bytes) -> Iterator[bytes]:
    for head, content in parts:
        yield head + content + b"\r\n"
    for head, path in files:
        yield head
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
        yield b"\r\n"
    yield tail
