"""What an HTTP caller is told when something is refused or fails.

    Refusal
    ├── Invalid              422   a field, a limit or a combination
    ├── Unauthorized         401   no key, or a wrong one
    ├── Forbidden            403   a key that may not, or no key where one is needed
    ├── NoSuchRoute          404   there is nothing at this address, for this caller
    ├── TooManyRequests      429   come back later; carries Retry-After
    ├── NotReady             503   starting, restarting or draining
    └── AdminRefusal         any   admin routes, with a stable code

Errors of other packages are not wrapped: `explain` looks their class up in tables that name status and type.
Two families of bodies exist, chosen by path:

    native        {"error": "<text>", "error_type": "<type>"}
    /v1, /admin   {"error": {"message": "<text>", "type": "<type>", "param": null, "code": "<code>"}}
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from adapters_store import errors as store_errors
from server.engine import errors as engine_errors
from server.front import errors as front_errors
from server.library import errors as library_errors
from server.loader import errors as loader_errors

log = logging.getLogger("veneer.http")

_MAX_PROBLEMS = 5  # of one body; a small body can cause thousands
_MAX_MESSAGE_CHARS = 2000
_UPLOAD_RETRY_S = "5"
_OBJECT_FAMILIES = ("/v1/", "/admin/")


class Refusal(Exception):
    """Base: status and type are data on the class, the message is for the caller."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"
    headers: Mapping[str, str] = {}


class Invalid(Refusal):
    status = 422
    error_type = "validation"


class Unauthorized(Refusal):
    status = 401
    error_type = "unauthorized"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class Forbidden(Refusal):
    status = 403
    error_type = "forbidden"


class NoSuchRoute(Refusal):
    status = 404
    error_type = "not_found"


class TooManyRequests(Refusal):
    status = 429
    error_type = "overloaded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.headers = {"Retry-After": _whole_seconds(retry_after_s)}


class NotReady(Refusal):
    """503. `error_type` is "loading" while the base comes up, "draining" when the server is about to stop."""

    status = 503

    def __init__(self, message: str, error_type: str = "loading") -> None:
        super().__init__(message)
        self.kind = error_type
        self.headers = {"Retry-After": "1"}


class AdminRefusal(Refusal):
    """A refusal of the admin routes: `code` is stable, scripts build on it."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.http_status = status
        self.code = code


class TooManyUploads(AdminRefusal):
    """429: this server has as many uploads in hand as it may."""

    def __init__(self, max_uploads: int) -> None:
        super().__init__(
            429, "too_many_uploads", f"{max_uploads} uploads are under way, and it takes no more; try again"
        )
        self.headers = {"Retry-After": _UPLOAD_RETRY_S}


class Explanation(NamedTuple):
    status: int
    error_type: str
    message: str
    code: str
    headers: Mapping[str, str]


# class -> (status, native error_type); the first match in this order wins
_FOREIGN: tuple[tuple[type[Exception], int, str], ...] = (
    (front_errors.InvalidRequest, 422, "validation"),
    (front_errors.TemplateFailed, 422, "template_error"),
    (front_errors.Overloaded, 429, "overloaded"),
    (front_errors.EngineGone, 503, "loading"),
    (front_errors.DeadlineExceeded, 504, "timeout"),
    (front_errors.GenerationFailed, 424, "generation"),
    (engine_errors.RequestRefused, 422, "validation"),
    (engine_errors.AdapterBusy, 409, "conflict"),
    (engine_errors.AdapterTooLarge, 422, "validation"),
    (engine_errors.NoRoomForAdapter, 503, "overloaded"),
    (engine_errors.AdapterLoadFailed, 424, "generation"),
    (engine_errors.EngineUnavailable, 503, "loading"),
    (library_errors.AdapterUnusable, 424, "generation"),
    (library_errors.GateFailed, 409, "conflict"),
    (library_errors.CanaryConflict, 409, "conflict"),
    (library_errors.SourceInvalid, 422, "validation"),
    (library_errors.SourceForbidden, 403, "forbidden"),
    (library_errors.SourceNotFound, 404, "adapter_not_found"),
    (library_errors.SourceDenied, 424, "generation"),
    (library_errors.SourceUnavailable, 503, "loading"),
    (loader_errors.AdapterRefused, 422, "validation"),
    (loader_errors.LoaderUnavailable, 503, "loading"),
    (store_errors.NotFound, 404, "adapter_not_found"),
    (store_errors.InvalidName, 422, "validation"),
    (store_errors.TooLarge, 413, "too_large"),
    (store_errors.DigestMismatch, 400, "validation"),
    (store_errors.MalformedArchive, 400, "validation"),
    (store_errors.PreconditionFailed, 412, "conflict"),
    (store_errors.UploadRefused, 422, "validation"),
    (store_errors.DiskFull, 507, "storage"),
    (store_errors.StagingFull, 429, "overloaded"),
    (store_errors.AdapterExists, 409, "conflict"),
    (store_errors.AliasInUse, 409, "conflict"),
    (store_errors.AdapterPinned, 409, "conflict"),
    (store_errors.NothingToRollBack, 409, "conflict"),
    (store_errors.InvalidWeights, 422, "validation"),
    (store_errors.InvalidAttribute, 422, "validation"),
)
_ADMIN_CODES = {"AdapterBusy": "adapter_in_use", "AdapterTooLarge": "too_large", "NoRoomForAdapter": "no_room"}


def explain(error: Exception) -> Explanation | None:
    """What to tell the caller about an error; None when it is a bug of ours."""
    if isinstance(error, AdminRefusal):
        return Explanation(error.http_status, error.code, str(error), error.code, error.headers)
    if isinstance(error, NotReady):
        return Explanation(error.status, error.kind, str(error), error.kind, error.headers)
    if isinstance(error, Refusal):
        return Explanation(error.status, error.error_type, str(error), error.error_type, error.headers)
    for kind, status, error_type in _FOREIGN:
        if isinstance(error, kind):
            code = _ADMIN_CODES.get(type(error).__name__) or str(getattr(error, "code", error_type))
            return Explanation(status, error_type, str(error), code, _retry_headers(error))
    return None


def install(app: FastAPI) -> None:
    """Register the one family of handlers."""
    for kind in (
        Refusal,
        front_errors.FrontError,
        engine_errors.EngineError,
        library_errors.LibraryError,
        loader_errors.LoaderError,
        store_errors.StoreError,
    ):
        app.add_exception_handler(kind, _answer_known)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)


def error_body(path: str, told: Explanation) -> dict[str, Any]:
    """The body for the family that the path belongs to."""
    message = told.message[:_MAX_MESSAGE_CHARS]
    if path.startswith(_OBJECT_FAMILIES):
        error = {"message": message, "type": told.error_type, "param": None, "code": told.code}
        return {"error": error}
    return {"error": message, "error_type": told.error_type}


def error_response(path: str, told: Explanation) -> Response:
    """JSON in pure ASCII, so that no piece of the caller's input can make the answer itself fail."""
    content = json.dumps(error_body(path, told)).encode("ascii")
    return Response(content, told.status, headers=dict(told.headers), media_type="application/json")


BUG = Explanation(500, "incomplete_generation", "an error inside the server; its log has the details", "internal", {})


async def _answer_known(request: Request, error: Exception) -> Response:
    told = explain(error)
    if told is None:
        raise error
    return _refuse(request, told)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [_problem(problem) for problem in error.errors()[:_MAX_PROBLEMS]]
    left = len(error.errors()) - len(problems)
    message = "; ".join(problems) + (f"; and {left} more" if left > 0 else "")
    return _refuse(request, Explanation(422, "validation", message, "validation", {}))


async def _answer_http(request: Request, error: Exception) -> Response:
    """Routing errors and those of the framework: unknown path, wrong method, body over its cap."""
    assert isinstance(error, HTTPException)
    # 400 has a meaning of its own for text-generation clients: they drop parameters and try again.
    status = 422 if error.status_code == 400 else error.status_code
    error_type = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(status, "validation")
    message = str(error.detail)
    if status == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.method} is no method of {request.url.path[:200]}; it takes {allowed}"
    if status == 404:
        message = f"no route {request.method} {request.url.path[:200]}; see /docs for those there are"
    return _refuse(request, Explanation(status, error_type, message, error_type, error.headers or {}))


def _refuse(request: Request, told: Explanation) -> Response:
    request.app.state.service.metrics.refused.labels(told.error_type).inc()
    return error_response(request.url.path, told)


def _problem(problem: Mapping[str, Any]) -> str:
    """One line of at most about 300 characters about one wrong field."""
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}"
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    if not where:
        return f"the body: {problem['msg']}; send a JSON object with Content-Type: application/json"
    if problem["type"] == "extra_forbidden":
        return f"unknown field `{where[:120]}`; see /docs for those there are"
    given = repr(problem.get("input"))
    shown = given if len(given) <= 80 else given[:80] + "..."
    return f"`{where[:120]}`: {problem['msg'].removeprefix('Value error, ')[:200]} (given: {shown})"


def _retry_headers(error: Exception) -> dict[str, str]:
    """Retry-After where waiting helps; x-should-retry where a client could not tell by the status."""
    headers = {}
    if isinstance(error, front_errors.Overloaded):
        headers["Retry-After"] = _whole_seconds(error.retry_after_s)
    elif isinstance(error, (front_errors.EngineGone, engine_errors.EngineUnavailable, engine_errors.NoRoomForAdapter)):
        headers["Retry-After"] = "1"
    elif isinstance(error, store_errors.StagingFull):
        headers["Retry-After"] = _UPLOAD_RETRY_S
    if isinstance(error, front_errors.GenerationFailed):
        headers["x-should-retry"] = str(error.retryable).lower()
    return headers


def _whole_seconds(seconds: float) -> str:
    return str(max(1, math.ceil(seconds)))
