"""Adapters that are dropped into a directory while the server runs: found, waited for until they are whole, taken.

    watch = DirectoryWatch(library, Path("./adapters"))
    await watch.look()        now and then; an adapter is taken when two looks found it the same

What was refused is not tried again until its files change. What is removed from the directory stays in the store.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from adapters_store.errors import StoreError
from adapters_store.record import Source
from server.library.directory import AdapterDirectory, find_directories
from server.library.errors import LibraryError
from server.library.library import Library
from server.loader.errors import LoaderError, LoaderUnavailable

logger = logging.getLogger(__name__)


class DirectoryWatch:
    """Belongs to one event loop. What is there at the first look was registered when the server started."""

    def __init__(self, library: Library, adapters_dir: Path) -> None:
        self._library = library
        self._adapters_dir = adapters_dir
        self._seen: dict[str, Source] = {}  # at the last look
        self._tried: dict[str, Source] | None = None  # as they were taken or refused; None before the first look

    async def look(self) -> list[str]:
        """Registers what is new and whole; its names. A directory that cannot be read is told, and stops nothing."""
        try:
            found = await asyncio.to_thread(self._find)
        except (LibraryError, StoreError, OSError) as error:
            logger.warning("the adapters in %s cannot be looked for: %s", self._adapters_dir, error)
            return []
        now = {directory.name: source for directory, source in found}
        if self._tried is None:
            self._tried = dict(now)
        settled = [item for item in found if self._seen.get(item[0].name) == item[1] != self._tried.get(item[0].name)]
        self._seen = now
        return [directory.name for directory, source in settled if await self._take(directory, source)]

    def _find(self) -> list[tuple[AdapterDirectory, Source]]:
        found = []
        for directory in find_directories(self._adapters_dir):
            try:
                found.append((directory, directory.source()))
            except (StoreError, OSError):  # it is being written, or cannot be read: a later look will tell
                continue
        return found

    async def _take(self, directory: AdapterDirectory, source: Source) -> bool:
        assert self._tried is not None
        self._tried[directory.name] = source
        try:
            committed = await self._library.register(directory)
        except LoaderUnavailable:
            del self._tried[directory.name]  # no fault of the adapter's
            return False
        except (StoreError, LoaderError, LibraryError, OSError):  # the registrar logs and remembers it
            return False
        if committed.created:
            logger.info("%s was found in %s", committed.version, self._adapters_dir)
        return committed.created
