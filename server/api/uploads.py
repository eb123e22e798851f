"""`POST /admin/v1/adapters`: an adapter's files come in, are checked against the base, and become a version.

Nothing of an upload counts before the commit: a refusal, a client that leaves or a full disk leaves the store as it
was. Content that is a version already makes no new one.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response

from server.api.auth import admin, guarded_router, scoped, takes_upload
from server.api.caller import caller_of
from server.api.documented import ADMIN_ONE, ADMIN_UPLOAD, Responses
from server.api.preconditions import Precondition
from server.api.resources import CheckResource, VersionResource
from server.api.service import Service
from server.api.upload import UploadForm, UploadMetadata, receive
from server.api.upload_order import UploadOrder, carry_out, known_record, require_known_query

router = guarded_router(prefix="/admin/v1", tags=["Adapters"])
_BODY = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UploadForm.model_json_schema()}}}
}
_RESPONSES: Responses = {
    **ADMIN_UPLOAD,
    404: ADMIN_ONE[404],
    200: {"description": "Known content, or a dry run.", "model": VersionResource | CheckResource},
    201: {"description": "A new version.", "model": VersionResource},
}


@router.post("/adapters", summary="Upload an adapter", status_code=201, responses=_RESPONSES, openapi_extra=_BODY)
@admin
@scoped
@takes_upload
async def upload(
    request: Request,
    dry_run: Annotated[bool, Query(description="Check the adapter and keep nothing.")] = False,
) -> Response:
    """`curl -F 'metadata={"name": "pirate"}' -F files=@adapter_config.json -F files=@adapter_model.safetensors URL`"""
    service: Service = request.app.state.service
    library = service.front.library
    require_known_query(request, ("dry_run",))
    precondition = Precondition.of(request.headers)

    def expect(metadata: UploadMetadata) -> None:
        caller_of(request).require(metadata.name)
        precondition.check(known_record(library, metadata.name))

    with library.stage() as stage:
        received = await receive(request, stage, service.settings, expect)
        service.metrics.upload_bytes.inc(received.num_bytes)
        wanted = received.metadata
        order = UploadOrder(wanted.name, received.aliases, wanted.if_exists == "error", dry_run, precondition)
        return await carry_out(request, stage, order)
