"""What a server does for its store from time to time, as long as it runs.

adapters whose time has come are deleted, versions beyond those to keep pruned, bytes that nobody holds freed, and
adapters that were dropped into the adapters' directory taken in

Whatever this process deletes by itself, a commit that prunes included, is written down and leaves the device.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from pathlib import Path
from typing import Protocol

from adapters_store.audit_log import AuditEntry
from adapters_store.errors import NotFound, StoreError
from adapters_store.record import AdapterVersion
from server.api.audit import Audit
from server.engine.errors import EngineError
from server.front.front import Front
from server.library.watch import DirectoryWatch

log = logging.getLogger("veneer.http")
TEND_EVERY_S = 60.0
EXPIRE_EVERY_S = 5.0
_ACTIONS = {"retention": "adapter.prune"}  # by why a version was deleted


class Caretaker:
    """Belongs to one event loop."""

    def __init__(self, front: Front, audit: Audit, adapters_dir: Path | None, watch_every_s: float) -> None:
        self._front = front
        self._audit = audit
        self._watch = None if adapters_dir is None else DirectoryWatch(front.library, adapters_dir)
        self._watch_every_s = watch_every_s
        self._removed: deque[tuple[str, list[AdapterVersion]]] = deque()  # (why, what), and nobody was told yet
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        front.library.catalog.upkeep.on_removed = self._hear

    async def run(self) -> None:
        """Until it is cancelled."""
        jobs = [(self.expire, EXPIRE_EVERY_S), (self.tend, TEND_EVERY_S), (self._tell_when_heard, 0.0)]
        if self._watch is not None and self._watch_every_s > 0:
            jobs.append((self.look, self._watch_every_s))
        await asyncio.gather(*(_now_and_then(job, every_s) for job, every_s in jobs))

    async def expire(self) -> None:
        """Deletes the adapters whose time to live is over."""
        await asyncio.to_thread(self._front.library.catalog.upkeep.expire)
        await self._tell()

    async def tend(self) -> None:
        """Prunes and frees."""
        await asyncio.to_thread(self._front.library.catalog.upkeep.tend)
        await self._tell()

    async def look(self) -> None:
        """Takes in what was dropped into the adapters' directory."""
        assert self._watch is not None
        await self._watch.look()

    def _hear(self, reason: str, versions: list[AdapterVersion]) -> None:
        """Called in any thread, from inside of a change."""
        self._removed.append((reason, versions))
        with contextlib.suppress(RuntimeError):  # the loop is no more
            self._loop.call_soon_threadsafe(self._news.set)

    async def _tell_when_heard(self) -> None:
        await self._news.wait()
        self._news.clear()
        await self._tell()

    async def _tell(self) -> None:
        """Writes down what was deleted, and clears the device of it."""
        while self._removed:
            reason, gone = self._removed.popleft()
            action = _ACTIONS.get(reason, "adapter.delete")
            for name in sorted({version.name for version in gone}):
                numbers = [version.version for version in gone if version.name == name]
                await self._audit.write(AuditEntry(reason, action, name, {"versions": numbers}))
                await self._forget(name)
            await self._send_away(gone)

    async def _forget(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            self._front.library.catalog.record(name)
            return  # it has other versions, or somebody uploaded it again
        await self._front.library.releases.forget(name)
        self._front.metrics.forget_adapter(name)

    async def _send_away(self, gone: list[AdapterVersion]) -> None:
        await self._front.library.pins.sync()
        for version in gone:
            if not self._front.library.catalog.names_using([version.content.effect_digest]):
                with contextlib.suppress(EngineError):  # in use: it goes when its place is wanted
                    await self._front.engine.evict(version.content.effect_digest)


class _Job(Protocol):
    async def __call__(self) -> None: ...


async def _now_and_then(job: _Job, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            await job()
        except (StoreError, OSError) as error:
            log.warning("the store could not be looked after: %s", error)
