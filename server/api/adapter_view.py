"""What the admin routes show of an adapter now: the store's record together with what the engine says."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request, Response
from fastapi.responses import JSONResponse

from adapters_store.record import AdapterRecord, AdapterVersion
from server.api.preconditions import etag_header
from server.api.resources import AdapterResource, Residents, VersionResource, adapter_resource, version_resource
from server.api.service import Service
from server.engine.errors import EngineUnavailable
from server.front.front import Front

Name = Annotated[str, Path(description="`name` or `org/name`", max_length=300)]
Number = Annotated[int, Path(ge=1, lt=10**9)]


def front_of(request: Request) -> Front:
    """Raises NotReady."""
    service: Service = request.app.state.service
    return service.front


async def residents_of(front: Front) -> Residents:
    """Who is on the device; nobody while the engine restarts, which is no reason to hide what is registered."""
    try:
        return Residents(await front.engine.residency(with_past=True))
    except EngineUnavailable:
        return Residents(())


def view_adapter(front: Front, record: AdapterRecord, residents: Residents) -> AdapterResource:
    return adapter_resource(record, [view_version(front, item, residents) for item in record.versions])


def view_version(front: Front, version: AdapterVersion, residents: Residents) -> VersionResource:
    in_flight = front.library.catalog.leases.count(version.name, version.version)
    return version_resource(version, residents, in_flight)


async def tagged_adapter(front: Front, name: str, status: int = 200) -> Response:
    """The adapter as it is now, under its `ETag`. Raises AdapterNotFound."""
    record = await front.library.show(name)
    body = view_adapter(front, record, await residents_of(front)).model_dump(mode="json")
    return JSONResponse(body, status, {"ETag": etag_header(record)})
