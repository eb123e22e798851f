"""Which adapters the operator wants on the device for good, told to the engine whenever that may have changed.

    pins.keep = engine.keep
    await pins.sync()            after a pin, a move of an alias, an upload or a deletion

A pinned adapter keeps what its bare name means there (all of it, where versions share it), a pinned version itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from adapters_store.catalog import Catalog
from adapters_store.errors import StoreError
from adapters_store.names import DEFAULT_ALIAS
from adapters_store.record import AdapterRecord, AdapterVersion
from server.engine.errors import EngineError
from server.engine.request import AdapterTicket
from server.library.errors import LibraryError
from server.loader.errors import LoaderError

logger = logging.getLogger(__name__)
_PAGE = 1000
Keep = Callable[[Sequence[AdapterTicket]], Awaitable[None]]
Ticket = Callable[[AdapterVersion], Awaitable[AdapterTicket]]


class Pins:
    """Belongs to one event loop."""

    def __init__(self, catalog: Catalog, ticket: Ticket) -> None:
        """`ticket` packs a version's image where it is missing."""
        self.keep: Keep | None = None  # set by whoever has an engine
        self._catalog = catalog
        self._ticket = ticket
        self._names: set[str] | None = None  # of adapters with pins; None: not looked for yet
        self._told: tuple[str, ...] = ()  # effects
        self._turn = asyncio.Lock()

    async def sync(self) -> None:
        """Tells the engine, where it is about something new. What cannot be kept is logged, and stops nothing."""
        try:
            await self.apply()
        except (EngineError, StoreError) as error:
            logger.warning("pinned adapters cannot be kept on the device now: %s", error)

    async def apply(self, name: str | None = None) -> None:
        """As `sync`; `name` is an adapter whose pins have changed. Raises NoRoomForAdapter, EngineUnavailable."""
        async with self._turn:
            if self._names is None:
                self._names = set(await asyncio.to_thread(self._find))
            if name is not None:
                self._names.add(name)
            if self.keep is None:
                return
            tickets = await self._tickets()
            if tuple(sorted(tickets)) == self._told:
                return
            await self.keep(list(tickets.values()))
            self._told = tuple(sorted(tickets))

    async def _tickets(self) -> dict[str, AdapterTicket]:
        """By effect: versions of equal content are one on the device."""
        tickets = {}
        for version in self._versions():
            try:
                ticket = await self._ticket(version)
            except (LibraryError, LoaderError) as error:
                logger.warning("%s is pinned, and cannot be served: %s", version, error)
                continue
            tickets[ticket.key] = ticket
        return tickets

    def _versions(self) -> list[AdapterVersion]:
        found = []
        for name in sorted(self._names or ()):
            try:
                found += pinned_versions(self._catalog.record(name))
            except StoreError:  # deleted
                self._names = (self._names or set()) - {name}
        return found

    def _find(self) -> list[str]:
        found, after = [], ""
        while True:
            records, next_after = self._catalog.page("", _PAGE, after)
            found += [
                record.name for record in records if record.attributes.pinned or record.attributes.pinned_versions
            ]
            if next_after is None:
                return found
            after = next_after


def pinned_versions(record: AdapterRecord) -> list[AdapterVersion]:
    """The versions of an adapter that its pins keep on the device."""
    wanted = set(record.attributes.pinned_versions)
    if record.attributes.pinned:
        route = record.routes.get(DEFAULT_ALIAS)
        wanted |= set(route.weights) if route else {item.version for item in (record.default,) if item is not None}
    return [version for version in record.versions if version.version in wanted]
