"""Looks after packed images while a server runs: within their bound on disk, and made anew when one is found broken.

    care = ImageCare(on_event)                     passes the engine's events on, and listens
    care.start(engine, library, max_bytes)
    await care.close()

An image that cannot be loaded (its bytes were damaged or are gone) fails the requests that wait for it. It is removed
then, packed again from the version's files and loaded, so that the next request finds it whole. One that fails again
soon after that is left alone: something else is wrong with it, and the engine tells what.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from adapters_store.errors import StoreError
from adapters_store.names import Reference
from adapters_store.record import AdapterVersion, VersionState
from server.engine.client import EngineClient, EngineEvent, OnEvent
from server.engine.errors import EngineError
from server.engine.request import AdapterState
from server.engine.step import AdapterEvent
from server.library.errors import LibraryError
from server.library.library import Library
from server.loader.errors import LoaderError

_SWEEP_EVERY_S = 30.0
_NOT_AGAIN_FOR_S = 600.0

_log = logging.getLogger(__name__)


class ImageCare:
    """Belongs to the engine's event loop."""

    def __init__(self, on_event: OnEvent) -> None:
        self._pass_on = on_event
        self._engine: EngineClient | None = None
        self._library: Library | None = None
        self._max_bytes = 0
        self._renewed_s: dict[str, float] = {}  # by key; one entry a broken image
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, engine: EngineClient, library: Library, max_bytes: int) -> None:
        """From now on failures are mended, and images take no more than `max_bytes` on disk where that is possible."""
        self._engine, self._library, self._max_bytes = engine, library, max_bytes
        self._keep(self._sweep())

    async def close(self) -> None:
        """Gives up what is going on. Again is harmless."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def on_event(self, event: EngineEvent) -> None:
        self._pass_on(event)
        if self._library is None or not isinstance(event, AdapterEvent) or event.state != AdapterState.FAILED:
            return
        now_s = time.monotonic()
        if now_s - self._renewed_s.get(event.key, -_NOT_AGAIN_FOR_S) >= _NOT_AGAIN_FOR_S:
            self._renewed_s[event.key] = now_s
            self._keep(self._renew(self._library, event.key))

    async def _renew(self, library: Library, key: str) -> None:
        version = _version_of(library, key)
        if version is None or self._engine is None:
            return
        _log.warning("the packed image of %s cannot be loaded; it is packed again", version)
        try:
            with library.catalog.lease(Reference(version.name, version.version, None)) as lease:
                await asyncio.to_thread(library.catalog.shelf.discard, key)
                await self._engine.load(await library.ticket(lease.version))
        except (StoreError, LibraryError, LoaderError, EngineError) as error:
            _log.error("the packed image of %s could not be made anew: %s", version, error)

    async def _sweep(self) -> None:
        while True:
            if self._library is not None and self._library.catalog.shelf.num_bytes > self._max_bytes:
                with contextlib.suppress(StoreError, OSError):  # another process changes the store; next time, then
                    await asyncio.to_thread(self._library.catalog.upkeep.sweep_images, self._max_bytes)
            await asyncio.sleep(_SWEEP_EVERY_S)

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _version_of(library: Library, key: str) -> AdapterVersion | None:
    """Some version with this effect that can be served; None for a probe's adapter or a deleted one."""
    for name in library.catalog.names_using((key,)):
        for version in library.catalog.record(name).versions:
            if version.content.effect_digest == key and version.state is VersionState.READY:
                return version
    return None
