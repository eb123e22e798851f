"""One HTTP request made by hand, so that a test can be a slow reader or leave in the middle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any


class AsgiCall:
    """Sends one JSON body and collects what comes. `leave()` closes the connection; `stalled` stops reading."""

    def __init__(self, app: Any, path: str, body: Mapping[str, Any], method: str = "POST") -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self.stalled = False
        self._left = asyncio.Event()
        self._content: bytes | None = json.dumps(body).encode()
        self._news = asyncio.Event()
        self._task = asyncio.create_task(app(_scope(method, path, len(self._content)), self._receive, self._send))

    @property
    def text(self) -> str:
        return b"".join(self.chunks).decode()

    async def wait_for_chunks(self, number: int) -> None:
        while len(self.chunks) < number:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), 10)

    def leave(self) -> None:
        self._left.set()

    async def finish(self) -> None:
        """Until the application has nothing more to do for this request."""
        await asyncio.wait_for(self._task, 10)

    async def _receive(self) -> dict[str, Any]:
        if self._content is not None:
            content, self._content = self._content, None
            return {"type": "http.request", "body": content, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Mapping[str, Any]) -> None:
        if self.stalled:
            await asyncio.Event().wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["body"]:
            self.chunks.append(message["body"])
        self._news.set()


def _scope(method: str, path: str, num_bytes: int) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost"), (b"content-length", b"%d" % num_bytes)]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
