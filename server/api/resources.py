"""The JSON of adapters and versions as the admin routes show them. Shapes only: nothing here waits or changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
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
    host: bool = Field(description="Whether the host tier holds a copy.")
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
    last_used_at: str | None = Field(description="null: not since the engine started.")
    created_at: str


class AdapterResource(BaseModel):
    object: Literal["adapter"] = "adapter"
    name: str
    state: str = Field(description="Of what the bare name means: ready, incompatible or failed.")
    reason: str | None = Field(description="Why it is not ready.")
    latest_version: int | None
    labels: dict[str, str]
    description: str
    pinned: bool = Field(description="What the bare name means stays on the device; no version expires or is pruned.")
    pinned_versions: list[int]
    expires_at: str | None = Field(description="The adapter is deleted then.")
    keep_versions: int | None = Field(description="Newest versions that are kept; null: as the server says.")
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


class ResidentResource(BaseModel):
    adapter: str = Field(description="name@version")
    state: str = Field(description="device, host, loading or failed")
    reason: str | None = Field(description="Why it failed.")
    bytes: int
    pins: int = Field(description="Running requests that hold it.")
    pinned: bool = Field(description="Kept on the device because an operator pinned it.")
    host: bool = Field(description="Whether the host tier holds a copy.")
    idle_s: float = Field(description="Seconds since it was last used.")
    load_s: dict[str, float] = Field(description="Of its last load, by phase.")


class CacheResource(BaseModel):
    """Who is in memory now."""

    object: Literal["cache"] = "cache"
    unit_bytes: int
    units: dict[str, int]
    tiers: dict[str, int] = Field(description="Bytes of adapters by tier.")
    requests_running: int
    requests_waiting: int
    leases: int = Field(description="Holds on adapter versions; one per accepted request on an adapter.")
    residents: list[ResidentResource]


class Residents:
    """Adapters that the engine knows, from one answer of it; names with equal content share one place there."""

    def __init__(self, adapters: Iterable[ResidentAdapter]) -> None:
        self._told_at = datetime.now(UTC)
        self._by_key: Mapping[str, ResidentAdapter] = {adapter.key: adapter for adapter in adapters}

    def of(self, version: AdapterVersion) -> DeviceResidency | None:
        adapter = self._by_key.get(version.content.effect_digest)
        if adapter is None or adapter.state in (AdapterState.DISK, AdapterState.HOST):
            return None
        state = "ready" if adapter.state is AdapterState.DEVICE else str(adapter.state)
        return DeviceResidency(state=state, bytes=adapter.num_bytes, pins=adapter.num_pins)

    def in_host(self, version: AdapterVersion) -> bool:
        adapter = self._by_key.get(version.content.effect_digest)
        return adapter is not None and adapter.in_host

    def last_used_at(self, version: AdapterVersion) -> str | None:
        """RFC 3339, UTC; of the content, where several versions have the same."""
        adapter = self._by_key.get(version.content.effect_digest)
        if adapter is None:
            return None
        then = self._told_at - timedelta(seconds=adapter.idle_s)
        return then.isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
        residency=Residency(device=residents.of(version), host=residents.in_host(version), disk=True),
        last_used_at=residents.last_used_at(version),
        in_flight=in_flight,
        created_at=version.created_at,
    )


def adapter_resource(record: AdapterRecord, versions: list[VersionResource]) -> AdapterResource:
    return AdapterResource(
        name=record.name,
        state=str(record.state),
        reason=record.failure or record.reason,
        latest_version=record.latest.version if record.latest else None,
        labels=dict(record.attributes.labels),
        description=record.attributes.description,
        pinned=record.attributes.pinned,
        pinned_versions=sorted(record.attributes.pinned_versions),
        expires_at=record.attributes.expires_at,
        keep_versions=record.attributes.keep_versions,
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
