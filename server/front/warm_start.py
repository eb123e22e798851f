"""The adapters that were on the device are there again before the server says that it is ready.

    warm = WarmStart(engine, library, path)
    await warm.load(on_event)      at start; the list that `path` holds, the most used first
    warm.watch()                   from then on the list follows what is on the device
    await warm.close()             written a last time

The list is a hint: what is gone or broken is passed over, and a lost file costs nothing but the first loads.
When the engine's process dies and is started again, it gets the same list back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from adapters_store.durable import make_directory, read_json, write_json
from adapters_store.errors import StoreError
from server.engine.client import EngineClient, LoadProgress, OnEvent
from server.engine.errors import EngineError, EngineUnavailable, NoRoomForAdapter
from server.engine.request import AdapterState
from server.engine.supervisor import EngineState
from server.library.errors import LibraryError
from server.library.library import Library
from server.loader.errors import LoaderError

MAX_LOADING_S = 60.0  # of a start; what is not there by then comes when it is asked for
_EVERY_S = 5.0
_MAX_NAMES = 4096

_log = logging.getLogger(__name__)


class WarmStart:
    """Belongs to the engine's event loop."""

    def __init__(self, engine: EngineClient, library: Library, path: Path) -> None:
        self._engine = engine
        self._library = library
        self._path = path
        self._names: list[str] = []  # as last written or read
        self._num_restarts = engine.num_restarts
        self._task: asyncio.Task[None] | None = None

    async def load(self, on_event: OnEvent) -> int:
        """Bring the listed adapters to the device, as long as there is room and time; how many came."""
        if not self._names:
            self._names = await asyncio.to_thread(_read, self._path)
        deadline_s, num_loaded = time.monotonic() + MAX_LOADING_S, 0
        for number, name in enumerate(self._names, 1):
            if time.monotonic() > deadline_s:
                _log.warning("%d adapters of the last run were not loaded in time", len(self._names) - number + 1)
                break
            try:
                num_loaded += await self._load_one(name)
            except NoRoomForAdapter:
                break
            on_event(LoadProgress("adapters of the last run", number / len(self._names)))
        return num_loaded

    def watch(self) -> None:
        """Keep the list in step with the device from now on."""
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Write the list, while the engine still runs. Again is harmless."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.save()

    async def save(self) -> None:
        """Write the list if it has changed. A disk that is full or gone is logged."""
        try:
            residents = await self._engine.residency()
        except EngineUnavailable:
            return  # the list is what was there before
        here = [one for one in residents if one.state is AdapterState.DEVICE]
        here.sort(key=lambda one: (-one.num_pins, -one.num_uses, one.idle_s))
        names = [one.name for one in here][:_MAX_NAMES]
        if names == self._names:
            return
        try:
            await asyncio.to_thread(_write, self._path, names)
        except (StoreError, OSError) as error:
            _log.warning("the list of adapters on the device could not be written: %s", error)
            return
        self._names = names

    async def _load_one(self, name: str) -> bool:
        """Whether it is there now. Raises NoRoomForAdapter."""
        try:
            with await self._library.resolve(name) as lease:
                await self._engine.load(lease.ticket)
        except NoRoomForAdapter:
            raise
        except (StoreError, LibraryError, LoaderError, EngineError) as error:
            _log.info("%s, on the device in the last run, is not loaded: %s", name, error)
            return False
        return True

    async def _watch(self) -> None:
        known: frozenset[str] | None = None
        while True:
            await asyncio.sleep(_EVERY_S)
            if self._engine.state is not EngineState.READY:
                continue
            if self._engine.num_restarts != self._num_restarts:
                self._num_restarts = self._engine.num_restarts
                await self.load(_nobody_listens)
            here = self._engine.on_device
            if here != known:  # the engine is asked only when something has changed
                known = here
                await self.save()


def _read(path: Path) -> list[str]:
    content: dict[str, Any] = {}
    with contextlib.suppress(StoreError, OSError):  # none yet, or damaged: nothing is lost
        content = read_json(path)
    names = content.get("adapters")
    return [name for name in names if isinstance(name, str)][:_MAX_NAMES] if isinstance(names, list) else []


def _write(path: Path, names: list[str]) -> None:
    make_directory(path.parent)
    write_json(path, {"adapters": names})


def _nobody_listens(event: object) -> None:
    pass
