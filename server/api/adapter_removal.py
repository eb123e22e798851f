"""Taking an adapter away: out of sight at once, off the device when the last request has left it."""

from __future__ import annotations

import asyncio
import contextlib

from fastapi import Request

from adapters_store.record import AdapterVersion, Expectation
from server.api.audit import changed
from server.api.service import Service
from server.engine.errors import AdapterBusy, EngineUnavailable
from server.front.front import Front
from server.library.library import Deleted

_EVICT_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


async def remove_adapter(
    request: Request,
    name: str,
    version: int | None = None,
    *,
    force: bool = False,
    drain_timeout_s: float = 0.0,
    expect: Expectation | None = None,
) -> Deleted:
    """Takes a version, or an adapter, out of sight, waits for those who use it, then frees what the device holds of it.

    Raises as `Library.delete`.
    """
    service: Service = request.app.state.service
    front = service.front
    gone = await front.library.delete(name, version, force=force, drain_timeout_s=drain_timeout_s, expect=expect)
    numbers = [item.version for item in gone.versions]
    changed(request, "adapter.delete", name if version is None else f"{name}@{version}", versions=numbers, force=force)
    await front.library.pins.sync()
    for item in gone.versions:
        if front.library.catalog.names_using([item.content.effect_digest]):
            continue  # the same content under another name
        try:
            await front.engine.evict(item.content.effect_digest)
        except AdapterBusy:  # requests still run on it
            service.keep(_evict_when_idle(front, item))
        except EngineUnavailable:  # nothing is on the device now
            break
    if version is None:
        front.metrics.forget_adapter(name)
    return gone


async def _evict_when_idle(front: Front, version: AdapterVersion) -> None:
    """The engine may need a few steps to see that the last request has left; after that it is evictable anyway."""
    await front.library.drained(version)
    for pause_s in _EVICT_PAUSES_S:
        await asyncio.sleep(pause_s)
        with contextlib.suppress(AdapterBusy):
            await front.engine.evict(version.content.effect_digest)
            return
