"""One adapter on its way from a source into a stage, in a thread of its own.

Until it is done the stage is the thread's, so that whoever waits may leave at any moment: the thread sees it at its
next piece, and clears away after itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from adapters_store.archive import ArchiveSink, unpack
from adapters_store.errors import StoreError, TooLarge
from adapters_store.record import Source
from adapters_store.staging import Stage
from server.library.errors import SourceError, SourceUnavailable
from server.library.sources.listing import AdapterSource, SourceFile

Phase = Literal["downloading", "validating"]
Progress = Callable[[int, int | None, Phase], None]  # (bytes so far, bytes in all or None, phase)
_TELL_EVERY_S = 0.1
_LEAVE_S = 1.0


class Fetched(NamedTuple):
    """A complete stage, which its receiver closes, and where its files came from."""

    stage: Stage
    source: Source


class _GivenUp(Exception):
    pass


class Download:
    def __init__(self, open_source: Callable[[], AdapterSource], stage: Stage, progress: Progress | None) -> None:
        """Takes the stage over. `progress` is called in the event loop of whoever calls `finish`."""
        self._open_source = open_source
        self._stage = stage.take_over()
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Fetched] = self._loop.create_future()
        self._has_ended = asyncio.Event()  # the thread
        self._clearing: asyncio.Future[None] | None = None  # of what came after nobody wanted it any more
        self._turn = threading.Lock()
        self._is_given_up = False
        self._told_s = 0.0
        self._num_bytes = 0
        self._total: int | None = None

    async def finish(self) -> Fetched:
        """Runs to its end; when cancelled it is given up and leaves nothing behind.

        Raises:
            SourceError, UploadRefused, DiskFull: and leaves nothing behind.
        """
        # A daemon: a source that does not answer must not keep the process from ending.
        threading.Thread(target=self._run, name="download", daemon=True).start()
        try:
            return await self._outcome
        except asyncio.CancelledError:
            await self._give_up()
            raise

    async def _give_up(self) -> None:
        """What is delivered already, or on its way, is cleared away in a thread: gigabytes take a while."""
        with self._turn:
            self._is_given_up = True
        if self._outcome.done() and not self._outcome.cancelled() and self._outcome.exception() is None:
            await asyncio.to_thread(self._outcome.result().stage.close)
        with contextlib.suppress(TimeoutError):  # a source that does not answer is not waited for
            await asyncio.wait_for(self._has_ended.wait(), _LEAVE_S)
        if self._clearing is not None:
            await self._clearing

    def _run(self) -> None:
        outcome: Fetched | Exception
        try:
            outcome = self._fetch()
        except (SourceError, StoreError, OSError, _GivenUp) as error:
            outcome = error
        except Exception as error:  # a library's own surprise is the source's failure, and not the server's
            outcome = SourceUnavailable(f"the source failed: {type(error).__name__}.")
            outcome.__cause__ = error
        with self._turn:
            if not self._is_given_up and not isinstance(outcome, Exception) and self._deliver(outcome):
                self._call(self._has_ended.set)
                return
        self._stage.close()
        if isinstance(outcome, Exception):
            self._deliver(outcome)
        self._call(self._has_ended.set)

    def _fetch(self) -> Fetched:
        self._tell(force=True)
        source = self._open_source()
        listing = source.list_files()
        self._require_wanted()
        sizes = [file.size for file in (listing.files if listing.archive is None else (listing.archive,))]
        self._total = sum(size for size in sizes if size is not None) if None not in sizes else None
        self._require_room(sum(size or 0 for size in sizes))
        self._tell(force=True)
        if listing.archive is not None:
            self._take_archive(source, listing.archive)
        for file in listing.files:
            with self._stage.open_file(file.name, num_bytes=file.size, sha256=file.sha256) as sink:
                self._copy(source, file, sink.write)
        self._tell(force=True)
        return Fetched(self._stage, listing.source)

    def _take_archive(self, source: AdapterSource, file: SourceFile) -> None:
        archive = ArchiveSink(self._stage, file.size or 0)
        try:
            self._copy(source, file, archive.write)
            unpack(archive, self._stage)
        finally:
            archive.close()

    def _copy(self, source: AdapterSource, file: SourceFile, write: Callable[[bytes], None]) -> None:
        for chunk in source.read(file):
            self._require_wanted()
            write(chunk)
            self._num_bytes += len(chunk)
            self._tell()

    def _require_room(self, num_bytes: int) -> None:
        limit = self._stage.limits.max_total_bytes
        if num_bytes > limit:
            raise TooLarge(f"the adapter has {num_bytes} bytes; the limit is {limit} for all its files together.")
        self._stage.announce(num_bytes)

    def _require_wanted(self) -> None:
        with self._turn:
            if self._is_given_up:
                raise _GivenUp

    def _tell(self, *, force: bool = False) -> None:
        now_s = time.monotonic()
        if self._progress is None or (now_s - self._told_s < _TELL_EVERY_S and not force):
            return
        self._told_s = now_s
        self._call(self._progress, self._num_bytes, self._total, "downloading")

    def _deliver(self, outcome: Fetched | Exception) -> bool:
        if isinstance(outcome, Exception):
            return self._call(self._settle, None, outcome)
        return self._call(self._settle, outcome, None)

    def _settle(self, fetched: Fetched | None, error: Exception | None) -> None:
        if self._outcome.done():  # cancelled while this was on its way
            if fetched is not None:
                self._clearing = self._loop.run_in_executor(None, fetched.stage.close)
        elif error is not None:
            self._outcome.set_exception(error)
        elif fetched is not None:
            self._outcome.set_result(fetched)

    def _call(self, function: Callable[..., None], *arguments: object) -> bool:
        """Has something run in the event loop; False if that is no more."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True
