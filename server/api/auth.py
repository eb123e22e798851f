"""Who may call what: deny by default.

Every route of this package is a `GuardedRoute`, made through `guarded_router()`, and asks for a key unless its
endpoint is marked otherwise:

    (no mark)    a key that may generate (to look: any key), when any key is set
    @public      nobody is asked
    @admin       a key that may administer (to look: one that may read). The command line's API keys do when neither an
                 admin key nor a keys file is set; without any key only callers of a server that listens on loopback,
                 and no web page of another origin. With an admin port, there alone.

The adapter that a path names must be one that the key sees; an admin route whose path names none is closed to keys
that do not see all adapters, unless its endpoint is marked `@scoped`: it keeps to what its caller sees by itself. A
query parameter that an admin route does not have is refused.

Keys of the command line are compared as digests, all of them each time, so that neither length nor position can be
measured. The header is never logged or passed on: clients may send a token there that is meant for somebody else.
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

from adapters_store.errors import AdapterNotFound
from server.api.caller import ALL_SCOPES, ANYBODY, STRANGER, Caller
from server.api.errors import AdminRefusal, Forbidden, NoSuchRoute, Refusal, Unauthorized, error_response, explain
from server.api.upload_body import FRAME_BYTES
from server.keys import KeysFile, Scope
from server.settings import LOOPBACK_HOSTS, Settings

_MARK = "veneer_access"
_UPLOAD_MARK = "veneer_takes_upload"
_SCOPED_MARK = "veneer_keeps_to_scope"
_LOOKING = ("GET", "HEAD")
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


class KeyRing:
    """The digests of a set of keys. An empty ring opens nothing and asks for nothing."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._digests = [_digest(key.get_secret_value()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def opens(self, key: str) -> bool:
        return self.position(key) is not None

    def position(self, key: str) -> int | None:
        """Which of the keys this is, from 0."""
        given = _digest(key)
        matches = [secrets.compare_digest(given, digest) for digest in self._digests]
        return matches.index(True) if any(matches) else None


class Gate:
    """The rule of the module docstring, for one server."""

    def __init__(self, settings: Settings) -> None:
        """Raises KeysFileError."""
        self._api_keys = KeyRing(settings.api_key)
        self._admin_keys = KeyRing(settings.admin_api_key)
        self._keys_file = None if settings.keys_file is None else KeysFile(settings.keys_file)
        self._is_loopback = settings.is_loopback
        self._admin_port = settings.admin_port
        self._allowed_origins = frozenset(settings.cors_allow_origin)

    def check(self, request: Request, access: str) -> Caller:
        """Who calls. Raises NoSuchRoute, Unauthorized or Forbidden."""
        key = _bearer(request)
        caller = None if key is None else self._find(key)
        if access == "public":
            return caller or (ANYBODY if self._keys_file is None else STRANGER)
        if access == "admin":
            return self._check_admin(request, key, caller)
        return self._check_user(request, key, caller)

    def _find(self, key: str) -> Caller | None:
        if (position := self._admin_keys.position(key)) is not None:
            name = f"admin key {position + 1}"
            return Caller(name, tenant=name)
        if (position := self._api_keys.position(key)) is not None:
            name, administers = f"API key {position + 1}", not self._admin_keys and self._keys_file is None
            return Caller(name, ALL_SCOPES if administers else frozenset(("generate",)), tenant=name)
        record = None if self._keys_file is None else self._keys_file.find(key)
        return None if record is None else Caller.of(record)

    def _check_user(self, request: Request, key: str | None, caller: Caller | None) -> Caller:
        if not self._api_keys and self._keys_file is None:  # admin keys alone guard the admin routes alone
            return caller or ANYBODY
        if key is None:
            raise Unauthorized("this server asks for a key: send `Authorization: Bearer KEY` " + _CLIENT_HINT)
        if caller is None:
            raise Unauthorized("the key in `Authorization` is not one of this server's " + _CLIENT_HINT)
        if request.method not in _LOOKING and "generate" not in caller.scopes:
            raise Forbidden(f"this key may {_listed(caller.scopes)}, but not generate; use another key")
        return caller

    def _check_admin(self, request: Request, key: str | None, caller: Caller | None) -> Caller:
        if self._admin_port is not None and _port(request) != self._admin_port:
            raise NoSuchRoute(f"no route {request.method} {request.url.path[:200]}; see /docs for those there are")
        if not (self._admin_keys or self._api_keys or self._keys_file):
            self._check_local(request)
            return ANYBODY
        if key is None:
            raise Unauthorized("the admin routes ask for a key: send `Authorization: Bearer ADMIN_KEY`")
        if caller is None:
            raise Unauthorized("the key in `Authorization` is not one of this server's admin keys")
        enough = {"admin", "read"} if request.method in _LOOKING else {"admin"}
        if not caller.scopes & enough:
            raise Forbidden(f"this key may {_listed(caller.scopes)}, but not administer; use an admin key")
        return caller

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
        known_query = sorted(parameter.alias for parameter in self.dependant.query_params)
        unknown_query_code = "invalid_upload" if getattr(self.endpoint, _UPLOAD_MARK, False) else "validation"

        async def guarded(request: Request) -> Response:
            gate: Gate = request.app.state.service.gate
            try:
                request.state.caller = caller = gate.check(request, access)
                _keep_to_scope(caller, request, access, getattr(self.endpoint, _SCOPED_MARK, False))
                if access == "admin":
                    _require_known_query(request, known_query, unknown_query_code)
            except (Refusal, AdapterNotFound) as refusal:
                told = explain(refusal)
                assert told is not None
                return error_response(request.url.path, told)
            capped = BodyCap(request.receive, _body_cap(self.endpoint, request.app.state.service.settings))
            response = await handle(Request(request.scope, capped))
            if access == "admin" and request.method not in ("GET", "HEAD") and response.status_code < 300:
                await request.app.state.service.audit.note(request, response, self.endpoint.__name__)
            return response

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


def scoped(endpoint: _Endpoint) -> _Endpoint:
    """An admin endpoint that names no adapter in its path and tells and changes only what its caller sees."""
    setattr(endpoint, _SCOPED_MARK, True)
    return endpoint


def takes_upload(endpoint: _Endpoint) -> _Endpoint:
    """The body may be as large as an adapter."""
    setattr(endpoint, _UPLOAD_MARK, True)
    return endpoint


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


def _body_cap(endpoint: Callable[..., Any], settings: Settings) -> int:
    if getattr(endpoint, _UPLOAD_MARK, False):
        return settings.max_upload_bytes + FRAME_BYTES
    return settings.max_body_bytes


_CLIENT_HINT = "(with huggingface_hub: pass api_key=... to InferenceClient)."


def _listed(scopes: frozenset[Scope]) -> str:
    return " and ".join(sorted(scopes)) or "nothing"


def _port(request: Request) -> int | None:
    """The port at which the request arrived, whatever its Host header says."""
    server = request.scope.get("server")
    return None if server is None else server[1]


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
