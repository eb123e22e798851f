"""`POST /admin/v1/adapters`: an adapter's files come in, are checked against the base, and become a version.

A JSON body names a source instead, see `server.api.pulls`.

Nothing of an upload counts before the commit: a refusal, a client that leaves or a full disk leaves the store as it
was. Content that is a version already makes no new one.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response

from server.api.blobs import pending_files
from server.api.caller import caller_of
from server.api.documented import ADMIN_CHANGE, ADMIN_ONE, ADMIN_UPLOAD, Responses
from server.api.errors import AdminRefusal
from server.api.guarded_route import admin, conditional, guarded_router, scoped, takes_upload
from server.api.operations import OperationResource
from server.api.preconditions import Precondition
from server.api.pulls import PullOrder, is_order, start_pull
from server.api.resources import CheckResource, VersionResource
from server.api.service import Service
from server.api.upload import UploadForm, UploadMetadata, receive
from server.api.upload_order import UploadOrder, carry_out, check_known
from server.api.upload_places import upload_stage

router = guarded_router(prefix="/admin/v1", tags=["Adapters"])
_CONTENT = {
    "multipart/form-data": {"schema": UploadForm.model_json_schema()},
    "application/json": {"schema": PullOrder.model_json_schema()},
}
_BODY = {"requestBody": {"required": True, "content": _CONTENT}}
_RESPONSES: Responses = {
    **ADMIN_UPLOAD,
    404: ADMIN_ONE[404],
    200: {"description": "Known content, or a dry run.", "model": VersionResource | CheckResource},
    201: {"description": "A new version.", "model": VersionResource},
    202: {"description": "The source is being fetched; follow the operation.", "model": OperationResource},
    424: ADMIN_CHANGE[424],
}


@router.post("/adapters", summary="Upload an adapter", status_code=201, responses=_RESPONSES, openapi_extra=_BODY)
@admin
@conditional
@scoped
@takes_upload
async def upload(
    request: Request,
    dry_run: Annotated[bool, Query(description="Check the adapter and keep nothing.")] = False,
    wait: Annotated[float, Query(ge=0, le=600, description="Seconds to wait for a source, before a 202.")] = 0.0,
) -> Response:
    """Files as they are, or JSON that names where to fetch them.

    `curl -F 'metadata={"name": "pirate"}' -F files=@adapter_config.json -F files=@adapter_model.safetensors URL`
    `curl --json '{"name": "sql", "source": {"uri": "org/sql-lora"}}' URL?wait=60`
    """
    if is_order(request):
        return await start_pull(request, is_dry_run=dry_run, wait_s=wait)
    service: Service = request.app.state.service
    library = service.front.library
    if "wait" in request.query_params:
        raise AdminRefusal(422, "invalid_upload", "`wait` is for a source; files are checked before the answer anyway")
    precondition = Precondition.of(request.headers)

    def expect(metadata: UploadMetadata) -> None:
        caller_of(request).require(metadata.name)
        check_known(library, metadata.name, precondition, create_only=metadata.if_exists == "error")

    async with upload_stage(service) as stage:
        pending = pending_files(service) if caller_of(request).sees_all else None
        received = await receive(request, stage, service.settings, expect, pending)
        service.metrics.upload_bytes.inc(received.num_bytes)
        wanted = received.metadata
        order = UploadOrder(wanted.name, received.aliases, wanted.if_exists == "error", dry_run, precondition)
        return await carry_out(request, stage, order)
