"""What is to become of an uploaded adapter, however its files came: checked only, or committed under a name."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from adapters_store.catalog import Committed
from adapters_store.errors import AdapterExists, AdapterNotFound
from adapters_store.names import DEFAULT_ALIAS, check_alias, check_name
from adapters_store.record import AdapterRecord
from adapters_store.staging import Stage
from server.api.adapter_view import residents_of, view_version
from server.api.audit import changed, unchanged
from server.api.preconditions import Precondition, etag_header
from server.api.resources import CheckResource, file_resources
from server.api.service import Service
from server.front.front import Front
from server.library.errors import GateFailed
from server.library.library import Library


@dataclass(frozen=True, slots=True)
class UploadOrder:
    name: str
    aliases: tuple[str, ...]  # that move to the version
    create_only: bool = False
    dry_run: bool = False
    precondition: Precondition = field(default_factory=Precondition)


def wanted_aliases(name: str, alias: str | None, promote: bool) -> tuple[str, ...]:
    """The aliases that move to a new version of `name`. Raises InvalidName."""
    check_name(name)
    named = () if alias is None else (check_alias(alias),)
    return (*((DEFAULT_ALIAS,) if promote else ()), *named)


def known_record(library: Library, name: str) -> AdapterRecord | None:
    try:
        return library.catalog.record(name)
    except AdapterNotFound:
        return None


def check_known(library: Library, name: str, precondition: Precondition, *, create_only: bool) -> None:
    """Holds what the caller expects of the adapter against what is there now; the commit does so again.

    Raises AdapterExists, PreconditionFailed.
    """
    known = known_record(library, name)
    if create_only and known is not None and known.versions:
        raise AdapterExists(f"adapter {name!r} exists, and this upload was to create it.")
    precondition.check(known)


async def carry_out(request: Request, stage: Stage, order: UploadOrder) -> Response:
    """Check the complete stage, and commit it unless it is a dry run.

    Raises what `Library.check` and `Library.add` raise.
    """
    service: Service = request.app.state.service
    front = service.front
    check_known(front.library, order.name, order.precondition, create_only=order.create_only)
    if order.dry_run:
        unchanged(request)
        return _json(await check_stage(front, stage, order.name), 200)
    try:
        committed = await front.library.add(
            stage,
            order.name,
            aliases=order.aliases,
            create_only=order.create_only,
            expect=order.precondition.check,
        )
    except GateFailed as error:
        if error.committed is not None:
            _note(request, order, error.committed)
        raise
    _note(request, order, committed)
    version = committed.version
    answer = _json(view_version(front, version, await residents_of(front)), 201 if committed.created else 200)
    answer.headers["location"] = f"/admin/v1/adapters/{version.name}/versions/{version.version}"
    record = known_record(front.library, version.name)
    if record is not None:  # else it has been deleted again already
        answer.headers["etag"] = etag_header(record)
    return answer


async def check_stage(front: Front, stage: Stage, name: str) -> CheckResource:
    """What a dry run answers. Raises what `Library.check` raises."""
    prepared = await front.library.check(stage)
    return CheckResource(
        name=name,
        digest=stage.manifest_digest,
        bytes=sum(file.size for file in stage.files),
        files=file_resources(stage.files),
        report=dict(prepared.report),
    )


def _note(request: Request, order: UploadOrder, committed: Committed) -> None:
    facts = {"created": committed.created, "aliases": list(order.aliases), "digest": committed.version.manifest_digest}
    changed(request, "adapter.upload", str(committed.version), **facts)


def _json(body: BaseModel, status: int) -> Response:
    return JSONResponse(body.model_dump(mode="json"), status)
