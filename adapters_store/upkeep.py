"""What a store needs done from time to time: deletes what expired or is too old, frees what nobody holds.

Every process on a store may do it, at any moment, as often as it likes: `tend` costs little when there is nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from adapters_store.durable import remove, remove_tree
from adapters_store.errors import AdapterPinned, AliasInUse, NotFound, PreconditionFailed
from adapters_store.holdings import Holdings
from adapters_store.image_sweep import sweep_images
from adapters_store.record import AdapterRecord, AdapterVersion

logger = logging.getLogger(__name__)

Delete = Callable[..., list[AdapterVersion]]  # `Catalog.delete`
OnRemoved = Callable[[str, list[AdapterVersion]], object]  # (why: "retention" or "time to live", what)


class Collected(NamedTuple):
    versions: int  # deleted ones whose records and bytes are gone now
    held: int  # deleted ones that some process still holds
    freed_bytes: int  # of files; packed images come on top
    stages: int  # uploads of processes that died


class Upkeep:
    def __init__(self, holdings: Holdings, delete: Delete, keep_versions: int | None) -> None:
        self._holdings = holdings
        self._layout = holdings.layout
        self._delete = delete
        self._keep_versions = keep_versions
        self.on_removed: OnRemoved = _nobody  # told of all that this process deletes by itself, in whichever thread

    def expire(self, at: datetime | None = None) -> list[AdapterVersion]:
        """Deletes the adapters whose `expires_at` has passed and that are not pinned; returns what went."""
        moment = at or datetime.now(UTC)

        def is_expired(record: AdapterRecord) -> bool:
            said = record.attributes
            return said.expires_at is not None and not said.pinned and datetime.fromisoformat(said.expires_at) <= moment

        def expect(record: AdapterRecord | None) -> None:
            if record is None or not is_expired(record):
                raise PreconditionFailed("it was given more time meanwhile.")

        with self._holdings.reading() as index:
            names = [name for name in index.attributes() if is_expired(index.record(name))]
        gone: list[AdapterVersion] = []
        for name in names:
            with contextlib.suppress(NotFound, PreconditionFailed, AdapterPinned):
                expired = self._delete(name, expect=expect)
                logger.info("%s has expired and is deleted", name)
                self.on_removed("time to live", expired)
                gone += expired
        return gone

    def prune(self, name: str) -> list[AdapterVersion]:
        """Deletes versions that are not among the newest N (`keep_versions` of the adapter, else of the store).

        A version that an alias points to, or that is pinned, stays.
        """
        record = self._holdings.record(name)
        if record is None:
            return []
        keep = record.attributes.keep_versions or self._keep_versions
        if keep is None or len(record.versions) <= keep:
            return []
        gone: list[AdapterVersion] = []
        for version in record.versions[:-keep]:

            def expect(present: AdapterRecord | None, number: int = version.version) -> None:
                if present is None or present.is_pinned(number):
                    raise PreconditionFailed("it was pinned meanwhile.")

            with contextlib.suppress(NotFound, AliasInUse, PreconditionFailed):
                gone += self._delete(name, version.version, expect=expect)
        if gone:
            self.on_removed("retention", gone)
        return gone

    def purge(self, version: AdapterVersion) -> int | None:
        """Removes a deleted version's record and the bytes that no other uses, unless some process holds it.

        Returns the bytes freed; None if it is held, or not there any more.
        """
        if not self._layout.is_open:
            return None  # whoever opens the store next finishes it
        with self._holdings.changing(), self._holdings.locks.tried(str(version)) as is_free:
            with self._holdings.reading() as index:
                is_due = is_free and index.is_hidden(version)
                blobs, effect = index.used_by_no_other(version)
                if index.has_damage:
                    blobs, effect = [], None
            return self._remove(version, blobs, effect) if is_due else None

    def collect(self) -> Collected:
        """Removes the bytes of deleted versions that no process on any host holds, stray files, and dead uploads.

        Stray are blobs and images that no version uses, cut-off small files, and rules of adapters that are no more.
        """
        with self._holdings.reading() as index:
            hidden = index.hidden()
        freed = [self.purge(version) for version in hidden]
        stages = self._holdings.sweep_stages()
        with self._holdings.changing():
            for path in list(self._layout.temporary_files()):
                remove(path)
            with self._holdings.reading() as index:
                has_damage, blobs, effects = index.has_damage, set(index.used_blobs), index.used_effects
            stray = 0 if has_damage else self._sweep(blobs, effects)
            if not has_damage:
                self._sweep_rules()
        done = [num_bytes for num_bytes in freed if num_bytes is not None]
        with self._holdings.reading() as index:
            held = len(index.hidden())
        return Collected(len(done), held, sum(done) + stray, stages)

    def sweep_images(self, max_bytes: int) -> int:
        """Keeps packed images within a bound, see `image_sweep.py`; bytes removed."""
        return sweep_images(self._holdings, max_bytes)

    def tend(self) -> Collected:
        """All of the above, for every adapter."""
        self.expire()
        with self._holdings.reading() as index:
            said = (self._keep_versions, *(found.keep_versions for found in index.attributes().values()))
            keep = min((number for number in said if number is not None), default=None)
            names = [] if keep is None else index.names_with_more_than(keep)
        for name in names:
            self.prune(name)
        return self.collect()

    def _remove(self, version: AdapterVersion, blobs: list[str], effect: str | None) -> int | None:
        """The record goes last, so that what could not be removed is tried again."""
        freed = 0
        try:
            with self._holdings.announced(version.name):
                for sha256 in blobs:
                    remove(self._layout.blob_path(sha256))
                freed = sum(file.size for file in version.files if file.sha256 in blobs)
                if effect is not None:
                    self._holdings.shelf.discard(effect)
                remove(self._layout.version_path(version.name, version.version))
        except OSError as error:
            logger.error("the bytes of %s, deleted, could not all be removed: %s", version, error)
            return None
        return freed

    def _sweep_rules(self) -> None:
        """A process died between a deletion and the removal of its rules; whoever takes the name starts without."""
        for name in self._layout.names_with_rules():
            if self._holdings.record(name) is None:
                remove_tree(self._layout.rules_directory(name))

    def _sweep(self, blobs: set[str], effects: set[str]) -> int:
        """Removes blobs and images that no version uses; bytes of blobs freed."""
        freed = 0
        for name in os.listdir(self._layout.blobs):
            if name not in blobs:
                freed += self._layout.blob_size(name) or 0
                remove(self._layout.blobs / name)
        self._holdings.shelf.keep_only(effects)
        return freed


def _nobody(reason: str, versions: list[AdapterVersion]) -> None:
    """Whoever keeps no log of it hears of nothing."""
