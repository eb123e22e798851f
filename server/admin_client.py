"""A thin client of the admin routes, for the command line. Standard library only.

client = AdminClient("http://127.0.0.1:8000", key=None)
client.push("pirate", Path("out/pirate"))
"""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from adapters_store.staging import is_allowed

PREFIX = "/admin/v1"
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

    def load(self, name: str) -> dict[str, Any]:
        return self.call("POST", f"/adapters/{quote(name)}/load", {})

    def evict(self, name: str) -> dict[str, Any]:
        return self.call("POST", f"/adapters/{quote(name)}/unload", {})

    def delete(self, name: str) -> dict[str, Any]:
        return self.call("DELETE", f"/adapters/{quote(name)}")

    def push(
        self, name: str, directory: Path, *, alias: str | None = None, promote: bool = True, dry_run: bool = False
    ) -> dict[str, Any]:
        """Upload the adapter files of a directory; other files in it stay where they are.

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
        body = _multipart(parts, heads, tail)
        return self._send("POST", "/adapters" + ("?dry_run=true" if dry_run else ""), body, headers)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request below the admin prefix. Raises RequestFailed."""
        if body is None:
            return self._send(method, path, None, {})
        return self._send(method, path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        kind = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        connection = kind(self._netloc, timeout=self._timeout_s)
        try:
            connection.request(method, f"{self._path}{PREFIX}{path}", body, {**self._headers, **headers})
            response = connection.getresponse()
            return _read(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailed(f"no answer from {self._scheme}://{self._netloc}: {error}") from None
        finally:
            connection.close()


def _read(status: int, content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        raise RequestFailed(f"the server answered {status} with something that is no JSON", status) from None
    if status < 400:
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
