"""The admin routes: upload, list, show, load, evict, delete.

    POST   /admin/v1/adapters                          upload (multipart); 201, or 200 if the content was known
    GET    /admin/v1/adapters                          list, by pages
    GET    /admin/v1/adapters/{name}                   one adapter with its versions
    POST   /admin/v1/adapters/{name}/load              bring a version to the device
    POST   /admin/v1/adapters/{name}/unload            take it off the device; it stays registered
    DELETE /admin/v1/adapters/{name}[/versions/{n}]    gone for new requests; running ones finish
    GET    /admin/v1/cache                             who is in device memory now

A name may hold one slash, so the routes with a suffix stand before those without.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Literal

from fastapi import Body, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from adapters_store.names import DEFAULT_ALIAS, check_name
from adapters_store.record import AdapterVersion, VersionState
from server.api.adapter_view import Name, Number, front_of, residents_of, view_adapter, view_version
from server.api.auth import admin, guarded_router, scoped
from server.api.caller import caller_of, visible_page
from server.api.documented import ADMIN, ADMIN_CHANGE, ADMIN_ONE
from server.api.resources import (
    AdapterList,
    AdapterResource,
    CacheResource,
    DeletedResource,
    ResidentResource,
    VersionList,
    VersionResource,
)
from server.engine.errors import AdapterBusy, EngineUnavailable
from server.front.front import Front

router = guarded_router(prefix="/admin/v1", tags=["Adapters"])
Drain = Annotated[float, Query(ge=0, le=3600, description="Seconds to wait for requests that use it.")]
_EVICT_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class LoadOrder(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    tier: Literal["device", "gpu"] = Field("device", description="`gpu` means the same.")
    version: int | None = Field(None, ge=1, lt=10**9, description="Default: what the bare name means.")
    wait: Literal[True] = Field(True, description="The answer comes when the adapter is there.")


class UnloadOrder(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    tier: Literal["device", "gpu", "all"] = "device"
    version: int | None = Field(None, ge=1, lt=10**9, description="Default: every version that is there.")


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
    return AdapterList(
        data=[view_adapter(front, record, residents) for record in records], next_page_token=next_page_token
    )


@router.get("/cache", summary="Who is in device memory", responses=ADMIN)
@admin
@scoped
async def show_cache(request: Request) -> CacheResource:
    front, caller = front_of(request), caller_of(request)
    residents = await front.engine.residency()
    stats = front.engine.stats()
    units = {
        "total": stats.num_units,
        "free": stats.units_free,
        "kv": stats.units_kv,
        "cached": stats.units_cached,
        "adapters_pinned": stats.units_adapters_pinned,
        "adapters_idle": stats.units_adapters_idle,
    }
    return CacheResource(
        unit_bytes=front.engine.description.unit_bytes,
        units=units,
        requests_running=stats.num_running,
        requests_waiting=stats.num_waiting,
        leases=front.library.catalog.leases.total(),
        residents=[
            ResidentResource(adapter=one.name, state=str(one.state), bytes=one.num_bytes, pins=one.num_pins)
            for one in residents
            if caller.sees(one.name.partition("@")[0])
        ],
    )


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


@router.delete("/adapters/{name:path}/versions/{version}", summary="Delete one version", responses=ADMIN_CHANGE)
@admin
async def delete_version(
    request: Request, name: Name, version: Number, force: bool = False, drain_timeout_s: Drain = 30.0
) -> DeletedResource:
    """Gone for new requests at once; requests that run on it finish. `force` also drops aliases that point to it."""
    return await _delete(request, check_name(name), version, force, drain_timeout_s)


@router.post("/adapters/{name:path}/load", summary="Bring an adapter to the device", responses=ADMIN_CHANGE)
@admin
async def load(request: Request, name: Name, order: Annotated[LoadOrder | None, Body()] = None) -> VersionResource:
    """Answers when it is there. Requests load what they need by themselves; this is for those who cannot wait."""
    front = front_of(request)
    selector = DEFAULT_ALIAS if order is None or order.version is None else str(order.version)
    with await front.library.resolve(f"{check_name(name)}@{selector}") as lease:
        await front.engine.load(lease.ticket)
    return view_version(front, lease.version, await residents_of(front))


@router.post("/adapters/{name:path}/unload", summary="Take an adapter off the device", responses=ADMIN_CHANGE)
@admin
async def unload(request: Request, name: Name, order: Annotated[UnloadOrder | None, Body()] = None) -> AdapterResource:
    """It stays registered, and comes back when a request needs it. 409 while requests run on it."""
    front = front_of(request)
    record = await front.library.show(check_name(name))
    for version in record.versions:
        if order is None or order.version in (None, version.version):
            await front.engine.evict(version.content.effect_digest)
    return view_adapter(front, record, await residents_of(front))


@router.get("/adapters/{name:path}", summary="Show an adapter", responses=ADMIN_ONE)
@admin
async def show_adapter(request: Request, name: Name) -> AdapterResource:
    front = front_of(request)
    return view_adapter(front, await front.library.show(check_name(name)), await residents_of(front))


@router.delete("/adapters/{name:path}", summary="Delete an adapter with all its versions", responses=ADMIN_CHANGE)
@admin
async def delete_adapter(
    request: Request, name: Name, force: bool = False, drain_timeout_s: Drain = 30.0
) -> DeletedResource:
    """Gone for new requests at once; requests that run on it finish, then its bytes are freed."""
    return await _delete(request, check_name(name), None, force, drain_timeout_s)


async def _delete(
    request: Request, name: str, version: int | None, force: bool, drain_timeout_s: float
) -> DeletedResource:
    """Take it out of sight, wait for those who use it, then free what the device holds of it."""
    front = front_of(request)
    gone = await front.library.delete(name, version, force=force, drain_timeout_s=drain_timeout_s)
    for item in gone.versions:
        try:
            await front.engine.evict(item.content.effect_digest)
        except AdapterBusy:  # requests still run on it
            request.app.state.service.keep(_evict_when_idle(front, item))
        except EngineUnavailable:  # nothing is on the device now
            break
    if version is None:
        front.metrics.forget_adapter(name)
    return DeletedResource(
        name=name, versions=[item.version for item in gone.versions], requests_left=gone.num_leases_left
    )


async def _evict_when_idle(front: Front, version: AdapterVersion) -> None:
    """The engine may need a few steps to see that the last request has left; after that it is evictable anyway."""
    await front.library.drained(version)
    for pause_s in _EVICT_PAUSES_S:
        await asyncio.sleep(pause_s)
        with contextlib.suppress(AdapterBusy):
            await front.engine.evict(version.content.effect_digest)
            return
