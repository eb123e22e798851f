"""vLLM's routes for adapters that come and go while the server runs, in its words, for clients that know no others.

    POST /v1/load_lora_adapter     {"lora_name": "sql", "lora_path": "/adapters/sql", "load_inplace": false}
    POST /v1/unload_lora_adapter   {"lora_name": "sql"}

Clients match the texts of these answers, so they are vLLM's to the letter; an error's `code` is its status. A load
answers when the adapter can be used. Equal loads at the same time are one load, so that a client that gave up waiting
and asks again joins its first one. `load_inplace` makes a new version: running requests end on the one they began with.
The routes exist only with --allow-runtime-lora-updating, and ask for an admin key where there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters_store.catalog import Committed
from adapters_store.errors import AdapterExists, AdapterNotFound, InvalidName, StoreError
from adapters_store.names import check_name
from server.api.adapter_removal import remove_adapter
from server.api.audit import changed
from server.api.caller import Caller, caller_of
from server.api.documented import Responses
from server.api.errors import NoSuchRoute
from server.api.guarded_route import admin, guarded_router, scoped
from server.api.preconditions import Precondition
from server.api.service import Service
from server.api.unknown import IGNORED_FIELDS_HEADER, header_value
from server.api.upload_order import check_known
from server.engine.errors import EngineError, EngineUnavailable, NoRoomForAdapter
from server.library.errors import LibraryError, SourceForbidden, SourceInvalid, SourceNotFound
from server.loader.errors import LoaderError

router = guarded_router(prefix="/v1", tags=["Runtime updates (vLLM)"])


class LoadBody(BaseModel):
    """vLLM's body. `is_3d_lora_weight` needs not be said: the layout is told from the files."""

    model_config = ConfigDict(extra="allow")

    lora_name: str = Field("", json_schema_extra={"minLength": 1})
    lora_path: str = Field("", description="org/repo, a path below an allowed root, or another source.")
    load_inplace: bool = Field(False, description="Whether a known name gets a new version.")


class UnloadBody(BaseModel):
    """vLLM's body. `lora_int_id` needs not be said: the name is the identity."""

    model_config = ConfigDict(extra="allow")

    lora_name: str = ""


class UpdateRefused(Exception):
    """A refusal in vLLM's words."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class VllmErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: int | str


class VllmError(BaseModel):
    error: VllmErrorBody


_ERROR: dict[str, Any] = {"model": VllmError}
_RESPONSES: Responses = {
    200: {"description": "A sentence.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    400: {**_ERROR, "description": "A field is missing, or the name is taken."},
    401: {**_ERROR, "description": "No key, or a wrong one."},
    403: {**_ERROR, "description": "A key that may not, or a path that is not allowed."},
    404: {**_ERROR, "description": "Unknown adapter or path, or the routes are off."},
    413: {**_ERROR, "description": "The body is too large."},
    500: {**_ERROR, "description": "It could not be loaded."},
    503: {**_ERROR, "description": "Starting, restarting or draining."},
}


def _body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


@router.post(
    "/load_lora_adapter",
    summary="Load an adapter",
    responses=_RESPONSES,
    response_class=Response,
    openapi_extra=_body(LoadBody),
)
@admin
@scoped
async def load_lora_adapter(request: Request) -> Response:
    """Answers when requests can name it."""
    service = _service(request)
    try:
        body, headers = await _read(request, LoadBody)
        assert isinstance(body, LoadBody)
        _check_load(service, caller_of(request), body)
        key = f"{body.lora_name} {body.lora_path} {body.load_inplace} {caller_of(request).sees_all}"
        committed = await service.joined.share(key, lambda: _load(request, body))
    except UpdateRefused as refusal:
        return _refused(refusal)
    _note(request, body, committed)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.", headers=headers)


@router.post(
    "/unload_lora_adapter",
    summary="Unload an adapter",
    responses=_RESPONSES,
    response_class=Response,
    openapi_extra=_body(UnloadBody),
)
@admin
@scoped
async def unload_lora_adapter(request: Request) -> Response:
    """It is deleted, with all its versions; requests that run on it finish."""
    _service(request)
    try:
        body, headers = await _read(request, UnloadBody)
        assert isinstance(body, UnloadBody)
        name = body.lora_name
        if not name:
            text = "'lora_name' needs to be provided to unload a LoRA adapter."
            raise UpdateRefused(400, "InvalidUserInput", text)
        try:
            caller_of(request).require(check_name(name))
            await remove_adapter(request, name, force=True)
        except (AdapterNotFound, InvalidName):
            text = f"The lora adapter '{name}' cannot be found."
            raise UpdateRefused(404, "NotFoundError", text) from None
    except UpdateRefused as refusal:
        return _refused(refusal)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.", headers=headers)


def _service(request: Request) -> Service:
    """Raises NoSuchRoute where the operator did not open these routes."""
    service: Service = request.app.state.service
    if not service.settings.allow_runtime_lora_updating:
        path = request.url.path
        raise NoSuchRoute(f"no route POST {path}; start the server with --allow-runtime-lora-updating to have it")
    return service


async def _read(request: Request, model: type[BaseModel]) -> tuple[BaseModel, dict[str, str]]:
    """The body, and a header that names its fields that mean nothing here. Raises UpdateRefused."""
    try:
        body = model.model_validate_json(await request.body() or b"{}")
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the body"
        raise UpdateRefused(400, "Bad Request", f"{where}: {problem['msg']}") from None
    extra = [name for name, value in (body.model_extra or {}).items() if value is not None]
    return body, {IGNORED_FIELDS_HEADER: header_value(extra)} if extra else {}


def _check_load(service: Service, caller: Caller, body: LoadBody) -> None:
    """Raises UpdateRefused for what is refused without looking at the path."""
    name, settings = body.lora_name, service.settings
    if not name or not body.lora_path:
        raise UpdateRefused(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
    if name in (settings.base_name, *settings.served_model_name):
        text = f"The lora adapter '{name}' conflicts with a served base model."
        raise UpdateRefused(400, "InvalidUserInput", text)
    try:
        check_name(name)
        caller.require(name)
    except InvalidName as error:
        raise UpdateRefused(400, "InvalidUserInput", str(error)) from None
    except AdapterNotFound as error:
        raise UpdateRefused(404, "NotFoundError", str(error)) from None


async def _load(request: Request, body: LoadBody) -> Committed:
    """Raises UpdateRefused."""
    committed = await _pull(request, body)
    _note(request, body, committed)
    await _bring_near(request, committed)
    return committed


def _note(request: Request, body: LoadBody, committed: Committed) -> None:
    facts = {"created": committed.created, "lora_path": body.lora_path, "load_inplace": body.load_inplace}
    changed(request, "adapter.register", str(committed.version), **facts)


async def _pull(request: Request, body: LoadBody) -> Committed:
    service: Service = request.app.state.service
    name, front = body.lora_name, service.front
    try:
        check_known(front.library, name, Precondition(), create_only=not body.load_inplace)
        return await front.puller.pull(
            body.lora_path, name, create_only=not body.load_inplace, is_trusted=caller_of(request).sees_all
        )
    except AdapterExists:
        text = (
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
        raise UpdateRefused(400, "InvalidUserInput", text) from None
    except SourceNotFound as error:
        raise UpdateRefused(404, "NotFoundError", str(error)) from None
    except SourceInvalid as error:
        raise UpdateRefused(400, "InvalidUserInput", str(error)) from None
    except SourceForbidden as error:
        raise UpdateRefused(403, "ForbiddenError", str(error)) from None
    except (LibraryError, LoaderError, StoreError, OSError) as error:
        raise UpdateRefused(500, "InternalServerError", str(error)) from None


async def _bring_near(request: Request, committed: Committed) -> None:
    """What cannot be loaded is not kept; what finds no room now comes when it is asked for."""
    service: Service = request.app.state.service
    library, version = service.front.library, committed.version
    try:
        with await library.resolve(str(version)) as lease:
            await service.front.engine.load(lease.ticket)
    except (NoRoomForAdapter, EngineUnavailable):
        return
    except (EngineError, LibraryError, LoaderError, StoreError) as error:
        if committed.created:
            with contextlib.suppress(StoreError):
                await library.delete(version.name, version.version, force=True)
        raise UpdateRefused(500, "InternalServerError", str(error)) from None


def _refused(refusal: UpdateRefused) -> Response:
    error: Mapping[str, Any] = {
        "message": str(refusal),
        "type": refusal.kind,
        "param": None,
        "code": refusal.status,
    }
    headers = {"x-should-retry": "false"} if refusal.status == 500 else {}
    return JSONResponse({"error": error}, refusal.status, headers)
