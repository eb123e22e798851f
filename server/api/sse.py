"""Server-sent events: one HTTP response that lives as long as its generation.

It writes chunks as they come, a comment when there is silence, and stops as soon as the client is gone or takes
nothing any more. What the chunks say is not known here.

    data: {"index":1,...}\\n\\n      an event; "\\n\\n" and nothing else separates events
    : ping\\n\\n                     a comment, so that no proxy closes a silent stream

The source of the chunks is closed in every case, and closing it is what aborts the generation.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

PING = b": ping\n\n"
_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}


def event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


class EventStream(Response):
    """Streams chunks of bytes.

    Parameters:
        chunks: what to write
        source: what `chunks` reads from; both are closed at the end, whatever the end is, even if no chunk was read
        keep_alive_s: seconds of silence before a comment is sent
        stall_s: seconds that one write may take before the client counts as gone
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        source: AsyncGenerator[Any, None],
        *,
        headers: Mapping[str, str],
        keep_alive_s: float,
        stall_s: float,
    ) -> None:
        super().__init__(status_code=200, headers={**headers, **_HEADERS})
        del self.headers["content-length"]
        self._chunks = chunks
        self._source = source
        self._keep_alive_s = keep_alive_s
        self._stall_s = stall_s
        self._last_write_s = 0.0
        self._writing_since_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write_all(send))
        watchers = [asyncio.create_task(_until_disconnect(receive)), asyncio.create_task(self._keep_alive(send))]
        try:
            await asyncio.wait([writer, *watchers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writer, *watchers):
                task.cancel()
            await asyncio.gather(writer, *watchers, return_exceptions=True)
            await self._chunks.aclose()
            await self._source.aclose()
        if not writer.cancelled() and (error := writer.exception()) is not None and not isinstance(error, OSError):
            raise error

    async def _write_all(self, send: Send) -> None:
        await self._write(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await self._write(send, {"type": "http.response.body", "body": chunk, "more_body": True})
        await self._write(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, message: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        self._writing_since_s = loop.time()
        await send(message)
        self._writing_since_s = None
        self._last_write_s = loop.time()

    async def _keep_alive(self, send: Send) -> None:
        """Ends when a write hangs for too long; then the stream ends too."""
        loop = asyncio.get_running_loop()
        self._last_write_s = loop.time()
        tick_s = min(self._keep_alive_s, self._stall_s) / 2
        while True:
            await asyncio.sleep(tick_s)
            if self._writing_since_s is not None:
                if loop.time() - self._writing_since_s > self._stall_s:
                    return
            elif loop.time() - self._last_write_s >= self._keep_alive_s:
                await self._write(send, {"type": "http.response.body", "body": PING, "more_body": True})


class ClientGone(Exception):
    """The caller closed the connection before there was an answer; nobody reads what is sent now."""


async def while_connected(request: Request, work: AsyncGenerator[Any, None]) -> Any:
    """The first item of `work`, or ClientGone as soon as the caller closes the connection.

    The request's body must have been read. On any error, and when the caller is gone, `work` is closed.
    """
    first = asyncio.ensure_future(anext(work, None))
    gone = asyncio.create_task(_until_disconnect(request.receive))
    try:
        await asyncio.wait([first, gone], return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            raise ClientGone
        return first.result()
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await work.aclose()
        raise
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
