"""Single files by their digest, sent ahead of the upload that names them.

    HEAD /admin/v1/blobs/sha256:<hex>     200 if it is there, 404 if it is to be sent
    PUT  /admin/v1/blobs/sha256:<hex>     the bytes; 201, or 200 if it was there (POST means the same)

An upload then lists path and digest of its files in `metadata.files` and sends no part for those. A blob that nobody
asks for within a day is gone.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Annotated

from fastapi import Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from adapters_store.errors import BlobNotFound
from adapters_store.pending import PendingFiles, parse_digest
from adapters_store.staging import WEIGHTS_FILE
from server.api.audit import unchanged
from server.api.documented import ADMIN_ONE, ADMIN_UPLOAD, Responses
from server.api.guarded_route import admin, guarded_router, takes_upload
from server.api.service import Service
from server.api.upload_body import announced_bytes, take_body
from server.api.upload_places import upload_stage

router = guarded_router(prefix="/admin/v1", tags=["Adapters"])
Digest = Annotated[str, Path(description="`sha256:` and 64 hex digits", max_length=100)]


class BlobResource(BaseModel):
    digest: str
    size: int


_BODY = {"requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}
_RESPONSES: Responses = {
    **ADMIN_UPLOAD,
    404: ADMIN_ONE[404],
    200: {"description": "It was there already.", "model": BlobResource},
}


def pending_files(service: Service) -> PendingFiles:
    return PendingFiles(service.front.library.catalog.root)


@router.head("/blobs/{digest}", summary="Ask for a file by its digest", responses=ADMIN_ONE, response_class=Response)
@admin
async def ask_blob(request: Request, digest: Digest) -> Response:
    """200 with its Content-Length, or 404."""
    sha256 = parse_digest(digest)
    num_bytes = await asyncio.to_thread(pending_files(request.app.state.service).size, sha256)
    if num_bytes is None:
        raise BlobNotFound(f"there is no blob sha256:{sha256}.")
    return Response(headers={"content-length": str(num_bytes)})


@router.put("/blobs/{digest}", summary="Send a file by its digest", status_code=201, responses=_RESPONSES,
            response_model=BlobResource, openapi_extra=_BODY, operation_id="put_blob")  # fmt: skip
@router.post("/blobs/{digest}", summary="Send a file by its digest", status_code=201, responses=_RESPONSES,
             response_model=BlobResource, openapi_extra=_BODY, operation_id="post_blob")  # fmt: skip
@admin
@takes_upload
async def send_blob(request: Request, digest: Digest) -> Response:
    """`curl -T adapter_model.safetensors URL/admin/v1/blobs/sha256:...`"""
    service: Service = request.app.state.service
    sha256 = parse_digest(digest)
    pending = pending_files(service)
    unchanged(request)  # nothing that anybody sees, before an upload names it
    num_bytes = await asyncio.to_thread(pending.size, sha256)
    if num_bytes is not None:
        return _tell(sha256, num_bytes, 200)
    async with upload_stage(service) as stage:
        opening = functools.partial(
            stage.open_file, WEIGHTS_FILE, num_bytes=announced_bytes(request) or None, sha256=sha256
        )
        sink = await asyncio.to_thread(opening)
        await take_body(request, stage, sink.write, service.settings)
        await asyncio.to_thread(sink.finish)
        await asyncio.to_thread(pending.keep, stage, WEIGHTS_FILE, sha256)
        service.metrics.upload_bytes.inc(stage.files[0].size)
        return _tell(sha256, stage.files[0].size, 201)


def _tell(sha256: str, num_bytes: int, status: int) -> Response:
    return JSONResponse({"digest": f"sha256:{sha256}", "size": num_bytes}, status)
