"""A visitor of a running server: asks, reads streams, uploads and evicts, by plain HTTP.

One blocking call a method and one connection a call, so that any number of threads may
share a visitor. Knows the routes; knows no registers and prints nothing.
"""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Refused(Exception):
    """The server answered with an error; the message is its own words."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body}")
        self.status = status


class StreamedToken(NamedTuple):
    text: str
    generated_text: str | None  # the whole answer, with the last token only


class Visitor:
    """Speaks to the server at `url`; `api_key` is sent when the server wants one."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url!r} is not an http:// address; expected one like http://127.0.0.1:8000")
        self._host, self._port = parts.hostname, parts.port or 80
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    def is_ready(self) -> bool:
        try:
            self._call("GET", "/health")
        except (OSError, Refused, http.client.HTTPException):
            return False
        return True

    def generate(self, prompt: str, adapter: str | None = None, **parameters: Any) -> str:
        """The whole answer. Raises Refused."""
        answer = self._call("POST", "/generate", _question(prompt, adapter, parameters))
        return str(json.loads(answer)["generated_text"])

    def stream(self, prompt: str, adapter: str | None = None, **parameters: Any) -> Iterator[StreamedToken]:
        """The answer's tokens as they arrive. Raises Refused, also when the stream breaks off with an error."""
        connection, response = self._open("POST", "/generate_stream", _question(prompt, adapter, parameters))
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[len(b"data:") :])
                if "error" in event:
                    raise Refused(response.status, event["error"])
                yield StreamedToken(event["token"]["text"], event["generated_text"])
        finally:
            connection.close()

    def upload(self, name: str, directory: Path) -> dict[str, Any]:
        """Register a directory of HF `peft` as a new adapter; returns what the server says of it."""
        boundary = secrets.token_hex(16)
        parts = [_part(boundary, 'name="metadata"', "application/json", json.dumps({"name": name}).encode())]
        for file in _ADAPTER_FILES:
            head = f'name="files"; filename="{file}"'
            parts.append(_part(boundary, head, "application/octet-stream", (directory / file).read_bytes()))
        body = b"".join(parts) + f"--{boundary}--\r\n".encode()
        answer = self._call("POST", "/admin/v1/adapters", body, f"multipart/form-data; boundary={boundary}")
        return dict(json.loads(answer))

    def adapters(self) -> list[dict[str, Any]]:
        return list(self._json("GET", "/admin/v1/adapters")["data"])

    def evict(self, name: str) -> None:
        """Take the adapter out of memory; it stays registered and comes back when it is asked for."""
        self._json("POST", f"/admin/v1/adapters/{name}/unload", {})

    def delete(self, name: str) -> None:
        self._call("DELETE", f"/admin/v1/adapters/{name}")

    def metrics(self) -> str:
        return self._call("GET", "/metrics").decode()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        encoded = None if body is None else json.dumps(body).encode()
        return dict(json.loads(self._call(method, path, encoded)))

    def _call(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        connection, response = self._open(method, path, body, kind)
        try:
            return response.read()
        finally:
            connection.close()

    def _open(
        self, method: str, path: str, body: bytes | None, kind: str = "application/json"
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send one request; the caller closes the connection. Raises Refused on any status but 2xx."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        headers = self._headers | ({"content-type": kind} if body is not None else {})
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            if response.status // 100 != 2:
                raise Refused(response.status, response.read().decode(errors="replace"))
        except BaseException:
            connection.close()
            raise
        return connection, response


def _question(prompt: str, adapter: str | None, parameters: Mapping[str, Any]) -> bytes:
    return json.dumps({"inputs": prompt, "adapter": adapter, "parameters": dict(parameters)}).encode()


def _part(boundary: str, disposition: str, kind: str, content: bytes) -> bytes:
    head = f"--{boundary}\r\ncontent-disposition: form-data; {disposition}\r\ncontent-type: {kind}\r\n\r\n"
    return head.encode() + content + b"\r\n"
