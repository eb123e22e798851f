"""What happens to every HTTP request, whatever its route: an id, a count, an arrival time, an answer.

A plain ASGI middleware, so that streams pass through it untouched. What fails behind it without an explanation is a
bug of ours: it is logged with its trace, and the caller gets a plain 500.

Running example: `X-Request-Id: abc` comes in -> `x-request-id: abc` goes out; none or a strange one -> a fresh one.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import BUG, error_response
from server.api.service import Service

log = logging.getLogger("veneer.http")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


class Doorstep:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived_s = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {}).update(request_id=request_id, arrived_s=arrived_s)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode("ascii"))]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("%s %s failed, id=%s", scope["method"], scope["path"], request_id)
            if status == 0:
                await error_response(scope["path"], BUG)(scope, receive, send_with_id)
        finally:
            self._note(scope, status, request_id, time.perf_counter() - arrived_s)

    def _note(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._service.metrics.http_requests.labels(route, str(status)).inc()
        if self._service.settings.access_log:
            log.info("%s %s %d %.3fs id=%s", scope["method"], route, status, seconds, request_id)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex
