"""Where adapters are: bringing them near and sending them away, and the view of who is in memory.

    POST /admin/v1/adapters/{name}/load      {"tier": "device" | "host", "version": 3, "wait": true}
    POST /admin/v1/adapters/{name}/unload    {"tier": "device" | "host" | "all"}; it stays registered
    GET  /admin/v1/cache                     who is on the device, in the host tier, on its way, or failed
    POST /admin/v1/cache/evict               {"tier": "device", "count": 3} or {"target_bytes": 0}: the idlest first

`gpu` and `cpu` are other words for `device` and `host`. What requests run on, and what is pinned, is never evicted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import Body, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters_store.names import DEFAULT_ALIAS, check_name
from server.api.adapter_view import Name, front_of, residents_of, view_adapter, view_version
from server.api.audit import changed, unchanged
from server.api.caller import caller_of
from server.api.documented import ADMIN, ADMIN_CHANGE, Responses
from server.api.guarded_route import admin, guarded_router, scoped
from server.api.operation import Operation
from server.api.operations import OperationResource, accepted
from server.api.resources import AdapterResource, CacheResource, ResidentResource, VersionResource
from server.api.service import Service
from server.engine.errors import AdapterBusy
from server.engine.request import AdapterState, ResidentAdapter, Tier
from server.front.front import Front

router = guarded_router(prefix="/admin/v1", tags=["Residency"])
TierName = Literal["device", "gpu", "host", "cpu"]
_TIERS = {"device": Tier.DEVICE, "gpu": Tier.DEVICE, "host": Tier.HOST, "cpu": Tier.HOST}
_LOADED: Responses = {
    **ADMIN_CHANGE,
    200: {"description": "It is there.", "model": VersionResource},
    202: {"description": "It is on its way (`wait` was false).", "model": OperationResource},
}


class LoadOrder(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    tier: TierName = "device"
    version: int | None = Field(None, ge=1, lt=10**9, description="Default: what the bare name means.")
    wait: bool = Field(True, description="Whether the answer comes when the adapter is there, or at once.")


class UnloadOrder(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    tier: TierName | Literal["all"] = "device"
    version: int | None = Field(None, ge=1, lt=10**9, description="Default: every version that is there.")


class EvictOrder(BaseModel):
    """How far to go: so many adapters, or until so many bytes are left."""

    model_config = ConfigDict(strict=True, extra="forbid")

    tier: TierName = "device"
    count: int | None = Field(None, ge=1, le=10**6)
    target_bytes: int | None = Field(None, ge=0, description="Bytes of adapters that may stay in the tier.")

    @model_validator(mode="after")
    def _is_one_of_both(self) -> EvictOrder:
        if (self.count is None) == (self.target_bytes is None):
            raise ValueError("give `count` or `target_bytes`")
        return self


class EvictedResource(BaseModel):
    object: Literal["cache.evicted"] = "cache.evicted"
    tier: str
    evicted: list[str] = Field(description="name@version, the idlest first")
    bytes: int = Field(description="Of those that were evicted.")
    bytes_left: int = Field(description="Of adapters that are in the tier now.")


@router.post("/adapters/{name:path}/load", summary="Bring an adapter near", responses=_LOADED)
@admin
async def load(request: Request, name: Name, order: Annotated[LoadOrder | None, Body()] = None) -> Response:
    """Requests load what they need by themselves; this is for those who cannot wait."""
    service: Service = request.app.state.service
    front, wanted = service.front, order or LoadOrder.model_validate({})
    selector = DEFAULT_ALIAS if wanted.version is None else str(wanted.version)
    version = front.library.look_up(f"{check_name(name)}@{selector}")
    tier = _TIERS[wanted.tier]

    async def work(running: Operation | None = None) -> Mapping[str, Any]:
        if running is not None:
            running.enter("loading")
        with await front.library.resolve(str(version)) as lease:
            await front.engine.load(lease.ticket, tier)
        return view_version(front, lease.version, await residents_of(front)).model_dump(mode="json")

    if not wanted.wait:
        actor = caller_of(request).name or "no key"
        return accepted(service.operations.start("adapter.load", str(version), work, actor=actor))
    shown = await work()
    changed(request, "adapter.load", str(version), tier=tier)
    return JSONResponse(shown)


@router.post("/adapters/{name:path}/unload", summary="Send an adapter away", responses=ADMIN_CHANGE)
@admin
async def unload(request: Request, name: Name, order: Annotated[UnloadOrder | None, Body()] = None) -> AdapterResource:
    """It stays registered, and comes back when a request needs it. 409 while requests run on it."""
    front, wanted = front_of(request), order or UnloadOrder.model_validate({})
    tiers = (Tier.DEVICE, Tier.HOST) if wanted.tier == "all" else (_TIERS[wanted.tier],)
    record = await front.library.show(check_name(name))
    if wanted.version is not None:
        front.library.look_up(f"{name}@{wanted.version}")
    gone: list[str] = []
    unchanged(request)
    for version in record.versions:
        if wanted.version in (None, version.version):
            for tier in tiers:
                if await front.engine.evict(version.content.effect_digest, tier):
                    gone.append(f"{version} from {tier}")
                    changed(request, "adapter.unload", name, tier=wanted.tier, evicted=gone)
    return view_adapter(front, record, await residents_of(front))


@router.get("/cache", summary="Who is in memory", responses=ADMIN)
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
        tiers={str(tier): sum(one.num_bytes for one in residents if _is_in(one, tier)) for tier in Tier},
        requests_running=stats.num_running,
        requests_waiting=stats.num_waiting,
        leases=front.library.catalog.leases.total(),
        residents=[_resident(one) for one in residents if caller.sees(one.name.partition("@")[0])],
    )


@router.post("/cache/evict", summary="Make room", responses=ADMIN_CHANGE)
@admin
async def evict_idlest(request: Request, order: Annotated[EvictOrder, Body()]) -> EvictedResource:
    """Those that were used longest ago go first. It stops early where the rest is in use or pinned."""
    front, tier = front_of(request), _TIERS[order.tier]
    there = [one for one in await front.engine.residency() if _is_in(one, tier)]
    left, gone = sum(one.num_bytes for one in there), list[ResidentAdapter]()
    unchanged(request)
    for one in sorted(there, key=lambda resident: -resident.idle_s):
        if len(gone) == order.count or (order.target_bytes is not None and left <= order.target_bytes):
            break
        if await _evict(front, one, tier):
            gone.append(one)
            left -= one.num_bytes
            changed(request, "cache.evict", str(tier), evicted=[one.name for one in gone])
    names, num_bytes = [one.name for one in gone], sum(one.num_bytes for one in gone)
    return EvictedResource(tier=tier, evicted=names, bytes=num_bytes, bytes_left=left)


async def _evict(front: Front, one: ResidentAdapter, tier: Tier) -> bool:
    """False if it is in use, pinned, or gone by itself."""
    if one.is_kept or (one.num_pins and tier is Tier.DEVICE):
        return False
    with contextlib.suppress(AdapterBusy):
        return await front.engine.evict(one.key, tier)
    return False


def _is_in(one: ResidentAdapter, tier: Tier) -> bool:
    return one.in_host if tier is Tier.HOST else one.state is AdapterState.DEVICE


def _resident(one: ResidentAdapter) -> ResidentResource:
    return ResidentResource(
        adapter=one.name,
        state=str(one.state),
        reason=one.reason or None,
        bytes=one.num_bytes,
        pins=one.num_pins,
        pinned=one.is_kept,
        host=one.in_host,
        idle_s=round(one.idle_s, 3),
        load_s={phase: round(seconds, 6) for phase, seconds in one.load_s.items()},
    )
