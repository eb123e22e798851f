"""The admin routes of adapters themselves: list, show, describe, pin, delete.

    GET    /admin/v1/adapters                          list, by pages
    GET    /admin/v1/adapters/{name}                   one adapter with its versions, under its `ETag`
    GET    /admin/v1/adapters/{name}/versions[/{n}]
    GET    /admin/v1/adapters/{name}/metrics           how its requests fared since the server started
    PATCH  /admin/v1/adapters/{name}                   labels, description, pins, time to live, versions to keep
    DELETE /admin/v1/adapters/{name}[/versions/{n}]    gone for new requests; running ones finish

A name may hold one slash, so the routes with a suffix stand before those without.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import Body, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from adapters_store.attributes import Attributes, check_attributes
from adapters_store.names import check_name
from adapters_store.record import AdapterRecord, VersionState
from server.api.adapter_removal import remove_adapter
from server.api.adapter_view import Name, Number, front_of, residents_of, tagged_adapter, view_adapter, view_version
from server.api.audit import changed
from server.api.caller import caller_of, visible_page
from server.api.documented import ADMIN, ADMIN_CHANGE, ADMIN_ONE, Responses
from server.api.guarded_route import admin, conditional, guarded_router, scoped
from server.api.preconditions import Precondition
from server.api.resources import AdapterList, AdapterResource, VersionList, VersionResource
from server.engine.errors import EngineError
from server.engine.metrics import AdapterCounts

router = guarded_router(prefix="/admin/v1", tags=["Adapters"])
Drain = Annotated[float, Query(ge=0, le=3600, description="Seconds to wait for requests that use it.")]
_TAGGED: Responses = {**ADMIN_ONE, 200: {"description": "The adapter.", "model": AdapterResource}}
_CHANGED: Responses = {**ADMIN_CHANGE, 200: {"description": "The adapter, changed.", "model": AdapterResource}}
_GONE: Responses = {
    **ADMIN_CHANGE,
    204: {"description": "Gone. `x-deleted-versions` names them, `x-requests-left` counts who still runs on them."},
}


class AdapterChange(BaseModel):
    """What is left out stays as it is; null takes it away."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        json_schema_extra={"examples": [{"labels": {"team": "bi", "old": None}, "pinned": True}]},
    )

    labels: dict[str, str | None] = Field({}, description="Merged with those there are; null removes one.")
    description: str | None = None
    pinned: bool | None = Field(None, description="Keep what the bare name means on the device.")
    pinned_versions: list[int] | None = Field(None, max_length=1000, description="Keep these versions.")
    ttl_s: float | None = Field(None, gt=0, le=10 * 365 * 86400, description="Delete the adapter after so long.")
    keep_versions: int | None = Field(None, ge=1, le=10**6, description="Newest versions that are kept.")

    def applied_to(self, before: Attributes) -> Attributes:
        """Raises InvalidAttribute."""
        given = self.model_fields_set
        labels = {key: value for key, value in {**before.labels, **self.labels}.items() if value is not None}
        after = replace(before, labels=labels)
        if "description" in given:
            after = replace(after, description=self.description or "")
        if "pinned" in given:
            after = replace(after, pinned=bool(self.pinned))
        if "pinned_versions" in given:
            after = replace(after, pinned_versions=frozenset(self.pinned_versions or ()))
        if "ttl_s" in given:
            after = replace(after, expires_at=None if self.ttl_s is None else _in_seconds(self.ttl_s))
        if "keep_versions" in given:
            after = replace(after, keep_versions=self.keep_versions)
        return check_attributes(after)


class AdapterMetrics(BaseModel):
    object: Literal["adapter.metrics"] = "adapter.metrics"
    name: str
    requests: dict[str, int] = Field(description="By how they ended.")
    prompt_tokens: int
    generated_tokens: int
    in_flight: int


@router.get("/adapters", summary="List adapters", responses=ADMIN)
@admin
@scoped
async def list_adapters(
    request: Request,
    state: Annotated[VersionState | None, Query(description="Of what the bare name means.")] = None,
    prefix: Annotated[str, Query(max_length=300)] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    page_token: Annotated[str, Query(max_length=300)] = "",
) -> AdapterList:
    """Adapters whose names begin with `prefix`, sorted by name."""
    front = front_of(request)
    residents = await residents_of(front)
    records, next_page_token = visible_page(front.library, caller_of(request), prefix, limit, page_token, state)
    data = [view_adapter(front, record, residents) for record in records]
    return AdapterList(data=data, next_page_token=next_page_token)


@router.get("/adapters/{name:path}/versions", summary="List the versions of an adapter", responses=ADMIN_ONE)
@admin
async def list_versions(request: Request, name: Name) -> VersionList:
    front = front_of(request)
    record = await front.library.show(check_name(name))
    return VersionList(data=view_adapter(front, record, await residents_of(front)).versions)


@router.get("/adapters/{name:path}/versions/{version}", summary="Show one version", responses=ADMIN_ONE)
@admin
async def show_version(request: Request, name: Name, version: Number) -> VersionResource:
    front = front_of(request)
    found = front.library.look_up(f"{check_name(name)}@{version}")
    return view_version(front, found, await residents_of(front))


@router.delete(
    "/adapters/{name:path}/versions/{version}",
    summary="Delete one version",
    status_code=204,
    responses=_GONE,
    response_class=Response,
)
@admin
@conditional
async def delete_version(
    request: Request, name: Name, version: Number, force: bool = False, drain_timeout_s: Drain = 30.0
) -> Response:
    """Gone for new requests at once; requests that run on it finish. `force` also drops aliases that point to it."""
    return await _delete(request, check_name(name), version, force, drain_timeout_s)


@router.get("/adapters/{name:path}/metrics", summary="How an adapter's requests fared", responses=ADMIN_ONE)
@admin
async def show_metrics(request: Request, name: Name) -> AdapterMetrics:
    front = front_of(request)
    await front.library.show(check_name(name))
    counts = front.metrics.adapters.get(name, AdapterCounts())
    return AdapterMetrics(
        name=name,
        requests=dict(counts.outcomes),
        prompt_tokens=counts.num_prompt_tokens,
        generated_tokens=counts.num_generated_tokens,
        in_flight=counts.num_in_flight,
    )


@router.get("/adapters/{name:path}", summary="Show an adapter", responses=_TAGGED)
@admin
async def show_adapter(request: Request, name: Name) -> Response:
    return await tagged_adapter(front_of(request), check_name(name))


@router.patch("/adapters/{name:path}", summary="Describe, pin or limit an adapter", responses=_CHANGED)
@admin
@conditional
async def change_adapter(request: Request, name: Name, change: Annotated[AdapterChange, Body()]) -> Response:
    """Versions never change; this is what may be said about them. `If-Match` with the `ETag` makes it conditional."""
    library, precondition = front_of(request).library, Precondition.of(request.headers)
    seen: list[Attributes] = []

    def apply(before: Attributes) -> Attributes:
        seen.append(before)
        return change.applied_to(before)

    def expect(record: AdapterRecord | None) -> None:
        precondition.check(record)
        for version in change.pinned_versions or ():
            library.look_up(f"{name}@{version}")

    await asyncio.to_thread(library.catalog.amend, check_name(name), apply, expect=expect)
    if {"pinned", "pinned_versions"} & change.model_fields_set:
        try:
            await library.pins.apply(name)
        except EngineError:
            await asyncio.to_thread(library.catalog.amend, name, lambda _: seen[0])
            raise
    changed(request, "adapter.change", name, **_told(change))
    return await tagged_adapter(front_of(request), name)


@router.delete(
    "/adapters/{name:path}",
    summary="Delete an adapter with all its versions",
    status_code=204,
    responses=_GONE,
    response_class=Response,
)
@admin
@conditional
async def delete_adapter(request: Request, name: Name, force: bool = False, drain_timeout_s: Drain = 30.0) -> Response:
    """Gone for new requests at once; requests that run on it finish, then its bytes go. A pin asks for `force`."""
    return await _delete(request, check_name(name), None, force, drain_timeout_s)


async def _delete(request: Request, name: str, version: int | None, force: bool, drain_timeout_s: float) -> Response:
    precondition = Precondition.of(request.headers)
    gone = await remove_adapter(
        request, name, version, force=force, drain_timeout_s=drain_timeout_s, expect=precondition.check
    )
    numbers = ",".join(str(item.version) for item in gone.versions)
    headers = {"x-deleted-versions": numbers, "x-requests-left": str(gone.num_leases_left)}
    return Response(status_code=204, headers=headers)


def _told(change: AdapterChange) -> dict[str, Any]:
    return change.model_dump(mode="json", exclude_unset=True)


def _in_seconds(seconds: float) -> str:
    then = datetime.now(UTC) + timedelta(seconds=seconds)
    return then.isoformat(timespec="milliseconds").replace("+00:00", "Z")
