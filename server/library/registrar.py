"""Keeps the store in step with adapters' directories: what is new is added, what is known is left alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from adapters_store.audit_log import AuditEntry, AuditLog
from adapters_store.catalog import Catalog, Committed
from adapters_store.errors import AdapterNotFound, StoreError
from adapters_store.names import DEFAULT_ALIAS, check_name
from adapters_store.record import AdapterVersion, Source, VersionState
from adapters_store.staging import Stage
from server.library.directory import AdapterDirectory, find_directories
from server.library.errors import AdapterUnusable, LibraryError
from server.library.obtain import obtain
from server.loader.errors import LoaderError

logger = logging.getLogger(__name__)

OnEach = Callable[[int, int, str], None]  # (number done, number found, name)


class Discovered(NamedTuple):
    added: list[str]  # names that got a new version
    unchanged: list[str]
    failed: dict[str, str]  # name -> reason


class Registrar:
    """Remembers, until the process ends, which directories could not be registered and why.

    What it registers has a line in the audit log, for nobody asked for it by a request.
    """

    def __init__(
        self, catalog: Catalog, add: Callable[..., Awaitable[Committed]], move: Callable[..., Awaitable[object]]
    ) -> None:
        """`add` is `Library.add`, `move` is `Releases.move`."""
        self.failures: dict[str, str] = {}  # name -> reason
        self._catalog = catalog
        self._add = add
        self._move = move
        self._audit = AuditLog(catalog.root)

    async def discover(self, adapters_dir: Path, on_each: OnEach | None = None) -> Discovered:
        """Registers every adapter below a directory. A bad one stops nothing: it is listed as failed, with the reason.

        Args:
            on_each: called as it goes.

        Raises:
            NotADirectory: there is no such directory, or it is an adapter itself.
        """
        result = Discovered([], [], {})
        found = await asyncio.to_thread(find_directories, adapters_dir)
        for number, directory in enumerate(found, 1):
            try:
                committed = await self.register(directory)
                (result.added if committed.created else result.unchanged).append(directory.name)
            except (StoreError, LoaderError, LibraryError, OSError) as error:
                result.failed[directory.name] = str(error)
            if on_each is not None:
                on_each(number, len(found), directory.name)
        return result

    async def register(self, directory: AdapterDirectory) -> Committed:
        """Copies an adapter's directory into the store; files that are known make no new version.

        The alias `default` moves to a new version, and to a known one if the directory went back to it; an alias that
        was moved by hand stays. Raises as `Library.add`, and OSError; the failure is remembered.
        """
        try:
            committed = await self._register(directory)
        except (StoreError, LoaderError, LibraryError, OSError) as error:
            logger.warning("adapter %r in %s cannot be served: %s", directory.name, directory.path, error)
            self.failures[directory.name] = str(error)
            raise
        self.failures.pop(directory.name, None)
        return committed

    def check(self, name: str) -> None:
        """Raises AdapterUnusable, with the reason, where the directory of this name could not be registered."""
        if name in self.failures:
            raise AdapterUnusable(f"adapter {name!r} could not be registered: {self.failures[name]}")

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """What is committed under a name; possibly nothing."""
        try:
            return self._catalog.record(name).versions
        except AdapterNotFound:
            return ()

    async def _register(self, directory: AdapterDirectory) -> Committed:
        check_name(directory.name)
        source = await asyncio.to_thread(directory.source)
        known = self._find_stamp(directory.name, source)
        if known is None:
            stage = await obtain(self._catalog.stage, Stage.close)
            try:
                await asyncio.to_thread(directory.copy_into, stage)
            except BaseException:
                await asyncio.to_thread(stage.close)
                raise
            known = self._catalog.find_content(directory.name, stage.manifest_digest)
            if known is None or known.state is not VersionState.READY:
                committed = await self._add(stage, directory.name, source=source)
                await self._note("adapter.register", str(committed.version), source)
                return committed
            await asyncio.to_thread(stage.close)
        if self._is_out_of_date(known):
            await self._move(known.name, DEFAULT_ALIAS, {known.version: 1})
            await self._note("alias.set", f"{known.name}@{DEFAULT_ALIAS}", source, after={str(known.version): 1})
        return Committed(known, created=False)

    async def _note(self, action: str, target: str, source: Source, **detail: Any) -> None:
        entry = AuditEntry("adapters directory", action, target, {"source": source.uri, **detail})
        await asyncio.to_thread(self._audit.note, entry)

    def _find_stamp(self, name: str, source: Source) -> AdapterVersion | None:
        ready = (item for item in self.versions(name) if item.state is VersionState.READY)
        return next((item for item in ready if item.source == source), None)

    def _is_out_of_date(self, known: AdapterVersion) -> bool:
        """Whether the bare name should come to mean `known`, the directory's present content."""
        versions = self.versions(known.name)
        from_there = [item.version for item in versions if item.source.uri == known.source.uri]
        if from_there and from_there[-1] != known.version:
            return True
        default = self._catalog.record(known.name).aliases.get(DEFAULT_ALIAS)
        return not any(item.version == default and item.state is VersionState.READY for item in versions)
