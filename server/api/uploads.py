"""`POST /admin/v1/adapters`: an adapter's files come in, are checked against the base, and become a version.

Nothing of an upload counts before the commit: a refusal, a client that leaves or a full disk leaves the store as it
was. Content that is a version already makes no new one.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse

from server.api.audit import unchanged
from server.api.auth import admin, guarded_router, takes_upload
from server.api.documented import ADMIN_UPLOAD, Responses
from server.api.resources import CheckResource, Residents, VersionResource, file_resources, version_resource
from server.api.service import Service
from server.api.upload import UploadForm, receive

router = guarded_router(prefix="/admin/v1", tags=["Adapters"])
_BODY = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UploadForm.model_json_schema()}}}
}
_RESPONSES: Responses = {
    **ADMIN_UPLOAD,
    200: {"description": "Known content, or a dry run.", "model": VersionResource | CheckResource},
    201: {"description": "A new version.", "model": VersionResource},
}


@router.post("/adapters", summary="Upload an adapter", status_code=201, responses=_RESPONSES, openapi_extra=_BODY)
@admin
@takes_upload
async def upload(
    request: Request,
    dry_run: Annotated[bool, Query(description="Check the adapter and keep nothing.")] = False,
) -> Response:
    """`curl -F 'metadata={"name": "pirate"}' -F files=@adapter_config.json -F files=@adapter_model.safetensors URL`"""
    service: Service = request.app.state.service
    front = service.front
    with front.library.stage() as stage:
        received = await receive(request, stage, service.settings.stalled_client_s)
        service.metrics.upload_bytes.inc(received.num_bytes)
        wanted = received.metadata
        if dry_run:
            unchanged(request)
            prepared = await front.library.check(stage)
            return _json(
                CheckResource(
                    name=wanted.name,
                    digest=stage.manifest_digest,
                    bytes=sum(file.size for file in stage.files),
                    files=file_resources(stage.files),
                    report=dict(prepared.report),
                ),
                200,
            )
        committed = await front.library.add(
            stage,
            wanted.name,
            aliases=received.aliases,
            create_only=wanted.if_exists == "error",
        )
    version = committed.version
    in_flight = front.library.catalog.leases.count(version.name, version.version)
    shown = version_resource(version, Residents(await front.engine.residency()), in_flight)
    answer = _json(shown, 201 if committed.created else 200)
    answer.headers["location"] = f"/admin/v1/adapters/{version.name}/versions/{version.version}"
    return answer


def _json(body: VersionResource | CheckResource, status: int) -> Response:
    return JSONResponse(body.model_dump(mode="json"), status)
