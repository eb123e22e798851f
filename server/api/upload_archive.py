"""`PUT /admin/v1/adapters/{name}`: an adapter in one archive, as `curl -T my.tar.gz URL` sends it.

    tar czf sql.tar.gz -C out/sql adapter_config.json adapter_model.safetensors
    curl -T sql.tar.gz http://127.0.0.1:8000/admin/v1/adapters/sql
    curl -T sql.zip "http://127.0.0.1:8000/admin/v1/adapters/sql?promote=false&alias=canary"

The archive goes to the disk as it comes, is unpacked there within the same caps as any upload, and is gone before its
files are checked. What it is, its first bytes say; a Content-Type that says otherwise is refused.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Path, Query, Request, Response

from adapters_store.archive import ArchiveSink, Format, format_of, unpack
from adapters_store.names import check_name
from adapters_store.staging import Stage
from server.api.documented import ADMIN_ONE, ADMIN_UPLOAD, Responses
from server.api.errors import AdminRefusal
from server.api.guarded_route import admin, conditional, guarded_router, takes_upload
from server.api.preconditions import Precondition
from server.api.resources import CheckResource, VersionResource
from server.api.service import Service
from server.api.upload_body import announced_bytes, take_body
from server.api.upload_order import UploadOrder, carry_out, check_known, wanted_aliases
from server.api.upload_places import upload_stage

router = guarded_router(prefix="/admin/v1", tags=["Adapters"])
_ANY: tuple[Format, ...] = ("tar", "gzip", "zip")
_FORMATS: dict[str, tuple[Format, ...]] = {
    "": _ANY,  # curl -T says nothing
    "application/octet-stream": _ANY,
    "application/x-tar": ("tar", "gzip"),
    "application/tar": ("tar", "gzip"),
    "application/gzip": ("gzip",),
    "application/x-gzip": ("gzip",),
    "application/zip": ("zip",),
    "application/x-zip-compressed": ("zip",),
}
_LEFT_OUT = "x-veneer-left-out"
_MAX_HEADER_CHARS = 1000
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("application/x-tar", "application/gzip", "application/zip", "application/octet-stream")
        },
    }
}
_RESPONSES: Responses = {
    **ADMIN_UPLOAD,
    404: ADMIN_ONE[404],
    200: {"description": "Known content, or a dry run.", "model": VersionResource | CheckResource},
    201: {"description": "A new version.", "model": VersionResource},
}


@router.put(
    "/adapters/{name:path}",
    summary="Upload an adapter as an archive",
    status_code=201,
    responses=_RESPONSES,
    openapi_extra=_BODY,
)
@admin
@conditional
@takes_upload
async def upload_archive(
    request: Request,
    name: Annotated[str, Path(description="`name` or `org/name`", max_length=300)],
    alias: Annotated[str | None, Query(description="Points to the version too, besides `default`.")] = None,
    promote: Annotated[bool, Query(description="Whether the bare name means it from now on.")] = True,
    dry_run: Annotated[bool, Query(description="Check the adapter and keep nothing.")] = False,
) -> Response:
    """`curl -T sql.tar.gz URL`: a tar, gzipped tar or zip archive of one adapter's files."""
    service: Service = request.app.state.service
    library = service.front.library
    order = UploadOrder(
        check_name(name),
        wanted_aliases(name, alias, promote),
        dry_run=dry_run,
        precondition=Precondition.of(request.headers),
    )
    check_known(library, name, order.precondition, create_only=order.create_only)
    formats = _announced_formats(request)
    async with upload_stage(service) as stage:
        left_out = await _receive(request, stage, formats)
        answer = await carry_out(request, stage, order)
    if left_out:
        answer.headers[_LEFT_OUT] = ascii(left_out)[1:-1][:_MAX_HEADER_CHARS]
    return answer


async def _receive(request: Request, stage: Stage, formats: tuple[Format, ...]) -> list[str]:
    """The archive's files, in the stage; returns what was left out."""
    service: Service = request.app.state.service
    archive = await asyncio.to_thread(ArchiveSink, stage, announced_bytes(request))
    try:
        await take_body(request, stage, archive.write, service.settings)
        service.metrics.upload_bytes.inc(archive.num_bytes)
        found = await asyncio.to_thread(format_of, archive)
        if found not in formats:
            raise AdminRefusal(
                415, "unsupported_media_type", f"Content-Type announces {' or '.join(formats)}, and this is {found}"
            )
        return await asyncio.to_thread(unpack, archive, stage)
    finally:
        await asyncio.to_thread(archive.close)


def _announced_formats(request: Request) -> tuple[Format, ...]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _FORMATS:
        known = ", ".join(filter(None, _FORMATS))
        raise AdminRefusal(
            415, "unsupported_media_type", f"{kind[:100]!r} is no archive; send one of {known}, or no Content-Type"
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise AdminRefusal(415, "unsupported_media_type", f"Content-Encoding {encoding[:100]!r} is not read; use gzip")
    formats = _FORMATS[kind]
    if encoding == "identity":
        return formats
    if "gzip" not in formats:
        raise AdminRefusal(415, "unsupported_media_type", "a zip archive is not sent with Content-Encoding gzip")
    return ("gzip",)
