"""The routes of this package: each asks its gate before it reads a body, and reads no more of that than its cap.

Every route is a `GuardedRoute`, made through `guarded_router()`. What it asks for, its endpoint's marks say:

    (no mark)        a key that may generate; `@public` nobody, `@admin` one that may administer, see `server.api.auth`
    @scoped          an admin endpoint that names no adapter in its path and keeps to what its caller sees by itself
    @takes_upload    its body may be as large as an adapter
    @conditional     it honours `If-Match` and `If-None-Match`, see `server.api.preconditions`

The adapter that a path names must be one that the key sees; an admin route whose path names none is closed to keys that
do not see all adapters, unless it is `@scoped`. What an admin route cannot honour, it refuses: a query parameter that
there is not, a precondition unless it is `@conditional`. A change that comes with an `Idempotency-Key` is carried out
once, see `server.api.idempotency`; every change leaves a line in the audit log, see `server.api.audit`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from adapters_store.errors import AdapterNotFound
from server.api.audit import Audit
from server.api.auth import LOOKING, Gate
from server.api.caller import Caller
from server.api.documented import IDEMPOTENCY_KEY, IDEMPOTENT, PRECONDITION, PRECONDITIONS, Responses
from server.api.errors import AdminRefusal, Forbidden, Refusal, error_response, explain
from server.api.idempotency import HEADER, once
from server.api.upload_body import FRAME_BYTES
from server.settings import Settings

_MARK = "veneer_access"
_UPLOAD_MARK = "veneer_takes_upload"
_SCOPED_MARK = "veneer_keeps_to_scope"
_CONDITIONAL_MARK = "veneer_honours_preconditions"
_PRECONDITIONS = ("if-match", "if-none-match")
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])
Handle = Callable[[Request], Coroutine[Any, Any, Response]]


class GuardedRoute(APIRoute):
    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        self.endpoint = endpoint
        if self._access == "admin" and not set(options.get("methods") or ("GET",)) <= set(LOOKING):
            _document(options, IDEMPOTENCY_KEY, IDEMPOTENT)
            if self._is_conditional:
                _document(options, PRECONDITION, PRECONDITIONS)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Handle:
        handle = super().get_route_handler()
        access = self._access
        known_query = sorted(parameter.alias for parameter in self.dependant.query_params)
        unknown_query_code = "invalid_upload" if getattr(self.endpoint, _UPLOAD_MARK, False) else "validation"

        async def guarded(request: Request) -> Response:
            gate: Gate = request.app.state.service.gate
            is_change = access == "admin" and request.method not in LOOKING
            try:
                request.state.caller = caller = gate.check(request, access)
                _keep_to_scope(caller, request, access, getattr(self.endpoint, _SCOPED_MARK, False))
                if access == "admin":
                    _require_known_query(request, known_query, unknown_query_code)
                if is_change:
                    _require_no_precondition(request, () if self._is_conditional else _PRECONDITIONS)
            except (Refusal, AdapterNotFound) as refusal:
                told = explain(refusal)
                assert told is not None
                return error_response(request.url.path, told)
            capped = BodyCap(request.receive, _body_cap(self.endpoint, request.app.state.service.settings))
            if not is_change:
                return await handle(Request(request.scope, capped))
            audited = self._audited(handle)
            if HEADER in request.headers:
                return await once(Request(request.scope, capped), audited)
            return await audited(Request(request.scope, capped))

        return guarded

    @property
    def _access(self) -> str:
        return str(getattr(self.endpoint, _MARK, "user"))

    @property
    def _is_conditional(self) -> bool:
        return bool(getattr(self.endpoint, _CONDITIONAL_MARK, False))

    def _audited(self, handle: Handle) -> Handle:
        async def audited(request: Request) -> Response:
            audit: Audit = request.app.state.service.audit
            try:
                response = await handle(request)
            except Exception as error:
                await audit.note_failure(request, error)
                raise
            await audit.note(request, response, self.endpoint.__name__)
            return response

        return audited


class BodyTooLarge(HTTPException):
    """413. An HTTPException, because FastAPI hides every other error that reading a body raises."""

    def __init__(self, max_body_bytes: int) -> None:
        super().__init__(413, f"the body is larger than this server takes here, {max_body_bytes} bytes")


class BodyCap:
    """An ASGI `receive` that counts the body and ends it at its cap."""

    def __init__(self, receive: Receive, max_body_bytes: int) -> None:
        self._receive = receive
        self._max_body_bytes = max_body_bytes
        self._num_bytes = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_body_bytes:
            raise BodyTooLarge(self._max_body_bytes)
        return message


def guarded_router(**options: Any) -> APIRouter:
    """The only way that this package makes routers."""
    return APIRouter(route_class=GuardedRoute, **options)


def public(endpoint: _Endpoint) -> _Endpoint:
    setattr(endpoint, _MARK, "public")
    return endpoint


def admin(endpoint: _Endpoint) -> _Endpoint:
    setattr(endpoint, _MARK, "admin")
    return endpoint


def scoped(endpoint: _Endpoint) -> _Endpoint:
    setattr(endpoint, _SCOPED_MARK, True)
    return endpoint


def takes_upload(endpoint: _Endpoint) -> _Endpoint:
    setattr(endpoint, _UPLOAD_MARK, True)
    return endpoint


def conditional(endpoint: _Endpoint) -> _Endpoint:
    setattr(endpoint, _CONDITIONAL_MARK, True)
    return endpoint


def _document(options: dict[str, Any], headers: list[dict[str, Any]], answers: Responses) -> None:
    """Adds headers, and answers that a route does not describe itself, to its part of the OpenAPI document; once."""
    extra = dict(options.get("openapi_extra") or {})
    known = [one["name"] for one in extra.get("parameters", ())]
    extra["parameters"] = [*extra.get("parameters", ()), *(one for one in headers if one["name"] not in known)]
    options["openapi_extra"] = extra
    options["responses"] = {**answers, **(options.get("responses") or {})}


def _keep_to_scope(caller: Caller, request: Request, access: str, keeps_to_it: bool) -> None:
    """Raises AdapterNotFound or Forbidden for what the caller does not see."""
    name = request.path_params.get("name")
    if access == "public" or caller.sees_all:
        return
    if name is not None:
        caller.require(name)
    elif access == "admin" and not keeps_to_it:
        raise Forbidden("this route is about all adapters; it takes a key for all adapters")


def _require_known_query(request: Request, known: list[str], code: str) -> None:
    """Raises AdminRefusal for a parameter that there is not: a misspelt `dry_run` must not commit."""
    for name in request.query_params:
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "there are none here"
            raise AdminRefusal(422, code, f"unknown parameter {name[:80]!r}; {there}")


def _require_no_precondition(request: Request, unsupported: tuple[str, ...]) -> None:
    """Raises AdminRefusal: a change that was meant on a condition must not happen without it."""
    for name in (*unsupported, "if-unmodified-since"):
        if name in request.headers:
            raise AdminRefusal(400, "precondition_unsupported", f"this route cannot honour `{name}`; leave it out")


def _body_cap(endpoint: Callable[..., Any], settings: Settings) -> int:
    if getattr(endpoint, _UPLOAD_MARK, False):
        return settings.max_upload_bytes + FRAME_BYTES
    return settings.max_body_bytes
