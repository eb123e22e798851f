"""The answers that routes document besides their 200, for OpenAPI. A test calls every route and compares."""

from __future__ import annotations

from typing import Any

from server.api.schemas import NativeError, ObjectError

Responses = dict[int | str, dict[str, Any]]


def _native(text: str, error_type: str, message: str) -> dict[str, Any]:
    example = {"error": message, "error_type": error_type}
    return {"model": NativeError, "description": text, "content": {"application/json": {"example": example}}}


def _object(text: str, code: str, message: str) -> dict[str, Any]:
    example = {"error": {"message": message, "type": code, "param": None, "code": code}}
    return {"model": ObjectError, "description": text, "content": {"application/json": {"example": example}}}


NOT_READY: Responses = {503: _native("Starting, restarting or draining.", "loading", "the base model is being loaded")}

GENERATION: Responses = {
    401: _native("No key, or a wrong one.", "unauthorized", "this server asks for a key"),
    404: _native("Unknown adapter, alias or version.", "adapter_not_found", "there is no adapter 'pirat'"),
    413: _native("The body is larger than --max-body-bytes.", "too_large", "Request Entity Too Large"),
    422: _native("A field, a limit or a combination.", "validation", "unknown field `temprature`"),
    424: _native("The generation failed, e.g. its adapter could not be loaded.", "generation", "..."),
    429: _native("The queue is full; see Retry-After.", "overloaded", "256 requests are waiting"),
    500: _native("An error inside the server.", "incomplete_generation", "..."),
    503: NOT_READY[503],
    504: _native("The request's time ran out.", "timeout", "..."),
}

_ADMIN: Responses = {
    401: _object("No key, or a wrong one.", "unauthorized", "the admin routes ask for a key"),
    403: _object("A key that may not administer, or no key where one is needed.", "forbidden", "..."),
    413: _object("Larger than the caps.", "too_large", "..."),
    422: _object("A name, a field, or an adapter that cannot be served here.", "validation", "..."),
    503: _object("Starting, restarting or draining.", "loading", "..."),
}
_ADMIN_NOT_FOUND = _object("Unknown adapter, alias or version.", "adapter_not_found", "...")

ADMIN = _ADMIN
ADMIN_ONE: Responses = {**_ADMIN, 404: _ADMIN_NOT_FOUND}
ADMIN_CHANGE: Responses = {
    **ADMIN_ONE,
    409: _object("In use, or not as the caller wants it.", "adapter_in_use", "..."),
    424: _object("The adapter could not be loaded.", "generation", "..."),
}
ADMIN_UPLOAD: Responses = {
    **_ADMIN,
    400: _object("The bytes are not those announced, or are no multipart body.", "digest_mismatch", "..."),
    408: _object("Nothing arrived for too long.", "upload_stalled", "..."),
    412: _object("The adapter is not as If-Match or If-None-Match expects.", "precondition_failed", "..."),
    415: _object("A body of another type.", "unsupported_media_type", "send the adapter as multipart/form-data"),
    409: _object("The adapter exists, and the caller wanted to create it.", "adapter_exists", "..."),
    507: _object("The disk is full.", "disk_full", "..."),
    429: _object("So many uploads are under way; see Retry-After.", "too_many_uploads", "..."),
}

IDEMPOTENT: Responses = {
    400: _object("A header that cannot be read, or that this route cannot honour.", "precondition_unsupported", "..."),
    409: _object("A request with this key is still under way; see Retry-After.", "idempotency_in_progress", "..."),
    422: _object("The key came with another request before.", "idempotency_key_reused", "..."),
}
PRECONDITIONS: Responses = {412: ADMIN_UPLOAD[412]}


def _header(name: str, text: str, **schema: Any) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": text,
        "schema": {"type": "string", **schema},
    }


IDEMPOTENCY_KEY = [
    _header(
        "Idempotency-Key",
        "The same key and the same request within a day: the answer of the first, and nothing is done again.",
        pattern="^[!-~]+$",
        maxLength=255,
    )
]
PRECONDITION = [
    _header("If-Match", "`*`, or the `ETag` that the adapter must still have."),
    _header("If-None-Match", "`*`: there must be no such adapter yet."),
]
