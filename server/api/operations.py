"""Operations over HTTP: what runs in the background, its progress as it happens, and how to stop it.

GET    /admin/v1/operations                youngest first
GET    /admin/v1/operations/{id}?wait=60   answers when it has ended, or after so many seconds
GET    /admin/v1/operations/{id}/events    server-sent events: the operation after each change, until it ends
DELETE /admin/v1/operations/{id}           cancel; 409 once it has ended or is committing
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from server.api.audit import changed
from server.api.caller import caller_of
from server.api.documented import ADMIN, ADMIN_CHANGE, ADMIN_ONE, Responses
from server.api.guarded_route import admin, guarded_router, scoped
from server.api.operation import Operation, OperationBook
from server.api.schemas import ErrorBody
from server.api.service import Service
from server.api.sse import EventStream, event

router = guarded_router(prefix="/admin/v1", tags=["Operations"])
OperationId = Annotated[str, Path(max_length=100)]
_RETRY_AFTER_S = "1"


class Progress(BaseModel):
    completed: int
    total: int | None = Field(description="null while it is not known.")
    unit: Literal["bytes"] = "bytes"


class OperationResource(BaseModel):
    object: Literal["operation"] = "operation"
    id: str
    kind: str
    target: str = Field(description="name or name@version")
    done: bool
    status: str = Field(description="queued, downloading, validating, loading, succeeded, failed or cancelled")
    progress: Progress
    error: ErrorBody | None
    result: dict[str, Any] | None = Field(description="The resource that it made.")
    created_at: str
    updated_at: str


class OperationList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OperationResource]


_EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "JSON: the operation"}}}
_EVENTS: Responses = {
    **ADMIN_ONE,
    200: {"description": "The operation after each change.", "content": {"text/event-stream": {"schema": _EVENT}}},
}


@router.get("/operations", summary="List operations", responses=ADMIN)
@admin
@scoped
async def list_operations(request: Request) -> OperationList:
    """Those on adapters that the caller sees."""
    found = [operation for operation in _book(request).all() if _sees(request, operation)]
    return OperationList(data=[operation_resource(operation) for operation in found])


@router.get("/operations/{operation_id}", summary="Show an operation", responses=ADMIN_ONE)
@admin
@scoped
async def show_operation(
    request: Request,
    operation_id: OperationId,
    wait: Annotated[float, Query(ge=0, le=600, description="Seconds to wait for its end.")] = 0.0,
) -> OperationResource:
    operation = _find(request, operation_id)
    if wait > 0:
        await operation.wait(wait)
    return operation_resource(operation)


@router.get(
    "/operations/{operation_id}/events",
    summary="Follow an operation",
    responses=_EVENTS,
    response_class=Response,
)
@admin
@scoped
async def follow_operation(request: Request, operation_id: OperationId) -> Response:
    """Server-sent events, one a change; the stream ends with the operation."""
    service: Service = request.app.state.service
    changes = _find(request, operation_id).changes()
    settings = service.settings
    return EventStream(
        _events(changes), changes, headers={}, keep_alive_s=settings.keep_alive_s, stall_s=settings.stalled_client_s
    )


@router.delete("/operations/{operation_id}", summary="Cancel an operation", responses=ADMIN_CHANGE)
@admin
@scoped
async def cancel_operation(request: Request, operation_id: OperationId) -> OperationResource:
    """What it had staged is gone when this answers."""
    operation = _find(request, operation_id)
    await operation.cancel()
    changed(request, "operation.cancel", operation.target, operation=operation.id, kind=operation.kind)
    return operation_resource(operation)


def operation_resource(operation: Operation) -> OperationResource:
    told = operation.error
    error = None if told is None else ErrorBody(message=told.message, type=told.error_type, param=None, code=told.code)
    return OperationResource(
        id=operation.id,
        kind=operation.kind,
        target=operation.target,
        done=operation.is_done,
        status=operation.status,
        progress=Progress(completed=operation.completed, total=operation.total),
        error=error,
        result=None if operation.result is None else dict(operation.result),
        created_at=operation.created_at,
        updated_at=operation.updated_at,
    )


def accepted(operation: Operation) -> Response:
    """202: where the operation is followed, and when a first look makes sense."""
    headers = {"Location": f"/admin/v1/operations/{operation.id}", "Retry-After": _RETRY_AFTER_S}
    return JSONResponse(operation_resource(operation).model_dump(mode="json"), 202, headers)


async def _events(changes: AsyncGenerator[Operation, None]) -> AsyncGenerator[bytes, None]:
    async for operation in changes:
        yield event(operation_resource(operation).model_dump(mode="json"))


def _find(request: Request, operation_id: str) -> Operation:
    """Raises AdminRefusal, in the same words for what is not there and for what the caller does not see."""
    return _book(request).find(operation_id, lambda operation: _sees(request, operation))


def _sees(request: Request, operation: Operation) -> bool:
    return caller_of(request).sees(operation.target.partition("@")[0])


def _book(request: Request) -> OperationBook:
    service: Service = request.app.state.service
    return service.operations
