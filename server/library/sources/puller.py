"""Adapters that the server fetches itself: from a source's text to a committed version.

    puller = Puller(library, policy)
    committed = await puller.pull("org/sql-lora@v2", "sql", progress=print)

Sizes are known and held against the caps and the disk before a byte is downloaded, where the source tells them; what
arrives goes through the same stage, checks and commit as an upload. A failure or a cancelled caller leaves nothing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from adapters_store.catalog import Committed
from adapters_store.names import DEFAULT_ALIAS, check_name
from adapters_store.record import Expectation
from adapters_store.staging import Stage
from server.library.errors import SourceForbidden, SourceInvalid
from server.library.library import Library
from server.library.obtain import obtain
from server.library.sources.download import Download, Fetched, Progress
from server.library.sources.listing import AdapterSource
from server.library.sources.policy import SourcePolicy
from server.library.sources.reference import Scheme, SourceReference, parse_source

_MAX_AT_ONCE = 4
_MAX_TOKEN_CHARS = 4096


class Puller:
    """Belongs to one event loop. At most four downloads run at once; further ones wait for their turn."""

    def __init__(self, library: Library, policy: SourcePolicy) -> None:
        self.policy = policy
        self._library = library
        self._turns = asyncio.Semaphore(_MAX_AT_ONCE)

    async def pull(
        self,
        uri: str,
        name: str,
        *,
        token: str | None = None,
        is_trusted: bool = True,
        aliases: Iterable[str] = (DEFAULT_ALIAS,),
        create_only: bool = False,
        expect: Expectation | None = None,
        progress: Progress | None = None,
    ) -> Committed:
        """Fetches an adapter and makes it a version of `name`; see `Library.add`.

        Args:
            uri: in the grammar of `server.library.sources.reference`.
            token: for this fetch alone; kept nowhere and told to nobody but the source.
            is_trusted: whether what this machine can reach, and the server's own credentials, are the caller's to use.
            progress: called with (bytes so far, bytes in all or None, phase).

        Raises:
            SourceError: it cannot be fetched from there.
            As `Library.add`: it was fetched, and is refused.
        """
        check_name(name)
        async with self.fetched(uri, token=token, is_trusted=is_trusted, progress=progress) as fetched:
            if progress is not None:
                num_bytes = sum(file.size for file in fetched.stage.files)
                progress(num_bytes, num_bytes, "validating")
            return await self._library.add(
                fetched.stage, name, source=fetched.source, aliases=aliases, create_only=create_only, expect=expect
            )

    @asynccontextmanager
    async def fetched(
        self, uri: str, *, token: str | None = None, is_trusted: bool = True, progress: Progress | None = None
    ) -> AsyncIterator[Fetched]:
        """The files of an adapter in a stage, gone when the block ends. Raises as `pull`."""
        reference = self.check(uri, token, is_trusted=is_trusted)
        async with self._turns:
            stage = await obtain(self._library.stage, Stage.close)
            # An empty token is none at all: not even the server's own.
            opening = functools.partial(open_source, reference, self.policy, token if is_trusted else token or "")
            fetched = await Download(opening, stage, progress).finish()
        try:
            yield fetched
        finally:  # removing gigabytes takes a while
            await asyncio.to_thread(fetched.stage.close)

    def check(self, uri: str, token: str | None = None, *, is_trusted: bool = True) -> SourceReference:
        """What can be known without asking anybody. Raises SourceInvalid, SourceForbidden."""
        reference = parse_source(uri)
        if token is not None:
            _check_token(reference, token)
        if self.policy.is_offline and reference.scheme in (Scheme.S3, Scheme.GS, Scheme.WEB):
            raise SourceForbidden(f"this server is offline, so {reference.scheme}:// is closed. Upload the adapter.")
        if not is_trusted and self._is_the_servers_own(reference):
            raise SourceForbidden("this key is bound to adapters, so it fetches from the Hub and by https:// alone.")
        return reference

    def _is_the_servers_own(self, reference: SourceReference) -> bool:
        """Whether it is read from this machine's disk, or with this machine's credentials."""
        if reference.scheme is Scheme.HUB:
            return self.policy.is_offline  # the cache holds whatever anybody fetched
        return reference.scheme is not Scheme.WEB


def open_source(reference: SourceReference, policy: SourcePolicy, token: str | None) -> AdapterSource:
    """The source of a parsed reference. Imports what it needs, and only that. Raises SourceForbidden."""
    if reference.scheme is Scheme.HUB:
        from server.library.sources.hub import HubSource

        return HubSource(reference, policy, token)
    if reference.scheme is Scheme.LOCAL:
        from server.library.sources.local import LocalSource

        return LocalSource(reference.place, policy.roots)
    if reference.scheme is Scheme.WEB:
        from server.library.sources.web import WebSource

        return WebSource(reference, policy, token)
    from server.library.sources.bucket import BucketSource

    return BucketSource(reference)


def _check_token(reference: SourceReference, token: str) -> None:
    if reference.scheme not in (Scheme.HUB, Scheme.WEB):
        raise SourceInvalid(f"{reference.scheme}:// takes no token: the server's own credentials are used.")
    if not token or len(token) > _MAX_TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
        raise SourceInvalid("the token is empty, or holds characters that no token has.")
