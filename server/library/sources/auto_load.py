"""Adapters that a request brings in by naming them: an unknown `org/name` is fetched from the Hub, where allowed.

    resolver = AutoLoader(library, puller)      resolves as the library does, and knows a little more

Only names that the operator's patterns cover are looked for, and only once at a time each. A name that was not found
is not looked for again for a while, so that asking for nonsense costs the Hub and this server nothing. The token is
the server's own; a caller has none of its own here, because what is fetched is then everybody's.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import OrderedDict

from adapters_store.audit_log import AuditEntry, AuditLog
from adapters_store.errors import AdapterNotFound, StoreError
from adapters_store.names import DEFAULT_ALIAS, parse_reference
from server.library.errors import LibraryError, SourceDenied, SourceNotFound, SourceUnavailable
from server.library.lease import AdapterLease
from server.library.library import Library
from server.library.shared_work import SharedWork
from server.library.sources.puller import Puller
from server.loader.errors import LoaderError

log = logging.getLogger(__name__)

_PATIENCE_S = 120.0  # of one request; the download goes on without it
_REMEMBERED_S = 60.0
_MAX_REMEMBERED = 1000


class AutoLoader:
    """Belongs to one event loop."""

    def __init__(self, library: Library, puller: Puller, patience_s: float = _PATIENCE_S) -> None:
        self._library = library
        self._puller = puller
        self._patience_s = patience_s
        self._work = SharedWork()
        self._audit = AuditLog(library.catalog.root)
        self._failures: OrderedDict[str, tuple[float, Exception]] = OrderedDict()  # name -> when, why

    async def resolve(self, reference: str, key: str | None = None) -> AdapterLease:
        """As `Library.resolve`.

        Raises:
            SourceUnavailable: the adapter is on its way, or the Hub does not answer; try again.
            Errors of the loader and the store: it was fetched, and cannot be served.
        """
        try:
            return await self._library.resolve(reference, key)
        except AdapterNotFound as error:
            wanted = parse_reference(reference)
            if wanted.alias != DEFAULT_ALIAS or not self._puller.policy.loads_by_itself(wanted.name):
                raise
            await self._bring(wanted.name, error)
        return await self._library.resolve(reference, key)

    async def close(self) -> None:
        """Gives up what is on its way."""
        await self._work.close()

    async def _bring(self, name: str, unknown: AdapterNotFound) -> None:
        known = self._failures.get(name)
        if known is not None and time.monotonic() - known[0] < _REMEMBERED_S:
            raise known[1].with_traceback(None)  # else every caller would leave frames on it
        job = functools.partial(self._pull, name)
        try:
            async with asyncio.timeout(self._patience_s):
                await self._work.share(name, job)
        except TimeoutError:
            raise SourceUnavailable(f"adapter {name!r} is still being fetched from the Hub; try again.") from None
        except (SourceNotFound, SourceDenied) as error:
            log.info("adapter %r is not there and was not found on the Hub: %s", name, error)
            # Whether it exists there and is merely private is the Hub's secret.
            self._remember(name, AdapterNotFound(f"{unknown} It is not on the Hub either, or is private there."))
            raise self._failures[name][1] from error
        except (LibraryError, LoaderError, StoreError) as error:
            log.warning("adapter %r cannot be loaded from the Hub: %s", name, error)
            self._remember(name, error)
            raise
        log.info("adapter %r was fetched from the Hub, because a request named it", name)

    async def _pull(self, name: str) -> None:
        committed = await self._puller.pull(f"hf://{name}", name)
        source = committed.version.source
        detail = {"source": source.uri, "revision": source.revision}
        entry = AuditEntry("auto load", "adapter.register", str(committed.version), detail)
        await asyncio.to_thread(self._audit.note, entry)

    def _remember(self, name: str, error: Exception) -> None:
        self._failures[name] = (time.monotonic(), error)
        self._failures.move_to_end(name)
        while len(self._failures) > _MAX_REMEMBERED:
            self._failures.popitem(last=False)
