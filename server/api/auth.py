"""Who may call what: deny by default.

Every route of this package is a `GuardedRoute`, made through `guarded_router()`, and asks for a key unless its
endpoint is marked otherwise:

    (no mark)    an API key or an admin key, when any key is set
    @public      nobody is asked
    @admin       an admin key; without admin keys an API key; without any key only callers of a server that
                 listens on loopback, and no web page of another origin

Keys are compared as digests, all of them each time, so that neither length nor position can be measured. The header
is never logged or passed on: clients may send a token there that is meant for somebody else.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from server.api.errors import Forbidden, Refusal, Unauthorized, error_response, explain
from server.settings import LOOPBACK_HOSTS, Settings

_MARK = "veneer_access"
_UPLOAD_MARK = "veneer_takes_upload"
_MULTIPART_SLACK_BYTES = 2**20  # boundaries, headers and metadata around the files
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


class KeyRing:
    """The digests of a set of keys. An empty ring opens nothing and asks for nothing."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._digests = [_digest(key.get_secret_value()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def opens(self, key: str) -> bool:
        given = _digest(key)
        matches = [secrets.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


class Gate:
    """The rule of the module docstring, for one server."""

    def __init__(self, settings: Settings) -> None:
        self._api_keys = KeyRing(settings.api_key)
        self._admin_keys = KeyRing(settings.admin_api_key)
        self._is_loopback = settings.is_loopback
        self._allowed_origins = frozenset(settings.cors_allow_origin)

    def check(self, request: Request, access: str) -> None:
        """Raises Unauthorized or Forbidden; says nothing otherwise."""
        if access == "public":
            return
        key = _bearer(request)
        if access == "admin":
            self._check_admin(request, key)
        elif self._api_keys or self._admin_keys:
            self._check_user(key)

    def _check_user(self, key: str | None) -> None:
        if not self._api_keys:  # only admin keys are set: they guard the admin routes alone
            return
        if key is None:
            raise Unauthorized("this server asks for a key: send `Authorization: Bearer KEY` " + _CLIENT_HINT)
        if not (self._api_keys.opens(key) or self._admin_keys.opens(key)):
            raise Unauthorized("the key in `Authorization` is not one of this server's " + _CLIENT_HINT)

    def _check_admin(self, request: Request, key: str | None) -> None:
        ring = self._admin_keys or self._api_keys
        if not ring:
            self._check_local(request)
            return
        if key is None:
            raise Unauthorized("the admin routes ask for a key: send `Authorization: Bearer ADMIN_KEY`")
        if ring.opens(key):
            return
        if self._api_keys.opens(key):
            raise Forbidden("this key may generate, but not administer; use an admin key")
        raise Unauthorized("the key in `Authorization` is not one of this server's admin keys")

    def _check_local(self, request: Request) -> None:
        """No key is set: only this machine, and not through a browser that shows somebody else's page."""
        if not self._is_loopback:
            raise Forbidden(
                "the admin routes are closed: no key is set and the server listens beyond loopback. "
                "Restart it with --admin-api-key KEY, or with --host 127.0.0.1."
            )
        host = _hostname(request.headers.get("host", ""))
        if host not in LOOPBACK_HOSTS and not host.startswith("127."):
            raise Forbidden(f"no key is set, so the admin routes answer only to localhost, not to {host[:100]!r}")
        origin = request.headers.get("origin")
        if origin is None or origin in self._allowed_origins:
            return
        if origin.partition("://")[2] != request.headers.get("host"):
            raise Forbidden("no key is set, so the admin routes answer no web page of another origin")


class GuardedRoute(APIRoute):
    """A route that asks its gate before the body is read, and reads no more of it than its cap."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        access = getattr(self.endpoint, _MARK, "user")

        async def guarded(request: Request) -> Response:
            gate: Gate = request.app.state.service.gate
            try:
                gate.check(request, access)
            except Refusal as refusal:
                told = explain(refusal)
                assert told is not None
                return error_response(request.url.path, told)
            capped = BodyCap(request.receive, _body_cap(self.endpoint, request.app.state.service.settings))
            return await handle(Request(request.scope, capped))

        return guarded


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


def takes_upload(endpoint: _Endpoint) -> _Endpoint:
    """The body may be as large as an adapter."""
    setattr(endpoint, _UPLOAD_MARK, True)
    return endpoint


def _body_cap(endpoint: Callable[..., Any], settings: Settings) -> int:
    if getattr(endpoint, _UPLOAD_MARK, False):
        return settings.max_upload_bytes + _MULTIPART_SLACK_BYTES
    return settings.max_body_bytes


_CLIENT_HINT = "(with huggingface_hub: pass api_key=... to InferenceClient)."


def _hostname(host: str) -> str:
    try:
        return urlsplit("//" + host).hostname or ""
    except ValueError:
        return ""


def _bearer(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return None
    return key.strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
