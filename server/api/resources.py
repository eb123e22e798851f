"""The JSON of adapters and versions as the admin routes show them. Shapes only: nothing here waits or changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from adapters_store.alias import weights_to_json
from adapters_store.record import AdapterRecord, AdapterVersion
from server.engine.request import AdapterState, ResidentAdapter


class FileResource(BaseModel):
    path: str
    size: int
    digest: str


class SourceResource(BaseModel):
    uri: str
    revision: str | None


class DeviceResidency(BaseModel):
    state: str = Field(description="loading, ready or failed")
    bytes: int
    pins: int = Field(description="Running requests that hold it there.")


class Residency(BaseModel):
    device: DeviceResidency | None
    disk: bool


class VersionResource(BaseModel):
    object: Literal["adapter.version"] = "adapter.version"
    name: str
    version: int
    digest: str = Field(description="Identity of the files.")
    state: str
    reason: str | None
    base_model: str | None = Field(description="As the adapter's own config names it.")
    bytes: int
    files: list[FileResource]
    source: SourceResource
    report: dict[str, Any] = Field(description="What was matched when the adapter was checked.")
    residency: Residency
    in_flight: int = Field(description="Requests that hold this version now.")
    created_at: str


class AdapterResource(BaseModel):
    object: Literal["adapter"] = "adapter"
    name: str
    state: str = Field(description="Of what the bare name means: ready, incompatible or failed.")
    reason: str | None = Field(description="Why it is not ready.")
    latest_version: int | None
    aliases: dict[str, int | dict[str, int]] = Field(description="Alias -> version, or versions with their shares.")
    created_at: str | None
    updated_at: str | None
    versions: list[VersionResource]


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterResource]
    next_page_token: str | None = Field(description="Pass as `page_token` for the next page; null at the end.")


class VersionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VersionResource]


class CheckResource(BaseModel):
    """The answer of a dry run: the adapter would be taken."""

    object: Literal["adapter.check"] = "adapter.check"
    name: str
    digest: str
    bytes: int
    files: list[FileResource]
    report: dict[str, Any]


class DeletedResource(BaseModel):
    object: Literal["adapter.deleted"] = "adapter.deleted"
    name: str
    versions: list[int]
    requests_left: int = Field(description="Requests that still run on it; its bytes go with the last one.")


class ResidentResource(BaseModel):
    adapter: str = Field(description="name@version")
    state: str
    bytes: int
    pins: int


class CacheResource(BaseModel):
    """Who is in device memory now."""

    object: Literal["cache"] = "cache"
    unit_bytes: int
    units: dict[str, int]
    requests_running: int
    requests_waiting: int
    leases: int = Field(description="Holds on adapter versions; one per accepted request on an adapter.")
    residents: list[ResidentResource]


class Residents:
    """Adapters that the engine knows, from one answer of it; names with equal content share one place there."""

    def __init__(self, adapters: Iterable[ResidentAdapter]) -> None:
        self._by_key: Mapping[str, ResidentAdapter] = {adapter.key: adapter for adapter in adapters}

    def of(self, version: AdapterVersion) -> DeviceResidency | None:
        adapter = self._by_key.get(version.content.effect_digest)
        if adapter is None:
            return None
        state = "ready" if adapter.state is AdapterState.DEVICE else str(adapter.state)
        return DeviceResidency(state=state, bytes=adapter.num_bytes, pins=adapter.num_pins)


def version_resource(version: AdapterVersion, residents: Residents, in_flight: int) -> VersionResource:
    return VersionResource(
        name=version.name,
        version=version.version,
        digest=version.manifest_digest,
        state=str(version.state),
        reason=version.reason,
        base_model=version.content.base_model,
        bytes=version.num_bytes,
        files=file_resources(version.files),
        source=SourceResource(uri=version.source.uri, revision=version.source.revision),
        report=dict(version.content.report),
        residency=Residency(device=residents.of(version), disk=True),
        in_flight=in_flight,
        created_at=version.created_at,
    )


def adapter_resource(record: AdapterRecord, versions: list[VersionResource]) -> AdapterResource:
    return AdapterResource(
        name=record.name,
        state=str(record.state),
        reason=record.failure or record.reason,
        latest_version=record.latest.version if record.latest else None,
        aliases=_aliases(record),
        created_at=record.created_at,
        updated_at=record.updated_at,
        versions=versions,
    )


def _aliases(record: AdapterRecord) -> dict[str, int | dict[str, int]]:
    shared = {alias: weights_to_json(route.weights) for alias, route in record.routes.items() if len(route.weights) > 1}
    return {**record.aliases, **shared}


def file_resources(files: Iterable[Any]) -> list[FileResource]:
    return [FileResource(path=file.path, size=file.size, digest=f"sha256:{file.sha256}") for file in files]
