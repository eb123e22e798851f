"""Who may call what: deny by default.

    user      a key that may generate (to look: any key), when any key is set
    public    nobody is asked
    admin     a key that may administer (to look: one that may read). The command line's API keys do when neither an
              admin key nor a keys file is set; without any key only callers of a server that listens on loopback, and
              no web page of another origin. With an admin port, there alone.

Which of them a route asks for, its endpoint's mark says, see `server.api.guarded_route`.

Keys of the command line are compared as digests, all of them each time, so that neither length nor position can be
measured. The header is never logged or passed on: clients may send a token there that is meant for somebody else.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi import Request
from pydantic import SecretStr

from server.api.caller import ALL_SCOPES, ANYBODY, STRANGER, Caller
from server.api.errors import Forbidden, NoSuchRoute, Unauthorized
from server.keys import KeysFile, Scope
from server.settings import LOOPBACK_HOSTS, Settings

LOOKING = ("GET", "HEAD")  # methods that change nothing


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
    """The rules of the module docstring, for one server."""

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
        if request.method not in LOOKING and "generate" not in caller.scopes:
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
        enough = {"admin", "read"} if request.method in LOOKING else {"admin"}
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
