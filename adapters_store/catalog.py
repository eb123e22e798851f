"""The adapters that a store holds: committed versions, the aliases that point to them, the leases on them.

    stage = catalog.stage()                       an upload begins; nothing of it counts yet
    catalog.commit(stage, "sql", content, ...)    sql@1 exists, and the alias `default` points to it
    with catalog.lease(parse_reference("sql")) as lease: ...      sql@1 stays on disk, whatever happens to its name
    catalog.delete("sql")                         gone for new requests; bytes go with the last lease

Every change is one rename of a small file, so a crash leaves what was committed and nothing else. The catalogue
does not look inside files: whoever commits has checked them and brings the effect digest.

One process holds a store at a time. Any thread may call; changes wait for each other, reading does not wait for them.
"""

from __future__ import annotations

import functools
import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from adapters_store.alias_book import AliasBook
from adapters_store.attributes import Attributes
from adapters_store.durable import make_directory, move_file, raise_if_full, remove, write_json
from adapters_store.errors import AdapterExists, AliasInUse, StoreError, VersionNotFound
from adapters_store.images import ImageShelf, StagedImage, StoredImage
from adapters_store.index import Index
from adapters_store.layout import Layout
from adapters_store.leases import Lease, LeaseBook
from adapters_store.names import DEFAULT_ALIAS, Reference, check_alias, check_name
from adapters_store.opening import open_index
from adapters_store.record import AdapterRecord, AdapterVersion, Content, Expectation, Source, VersionState
from adapters_store.staging import Stage, StageLimits
from adapters_store.upkeep import Upkeep

logger = logging.getLogger(__name__)


class Committed(NamedTuple):
    version: AdapterVersion
    created: bool  # False: this content was a version already


class Page(NamedTuple):
    records: list[AdapterRecord]
    next_after: str | None  # pass as `after` for the next page; None at the end


def _run(job: Callable[[], None]) -> None:
    job()


class Catalog:
    def __init__(
        self,
        root: Path,
        base_fingerprint: str,
        *,
        limits: StageLimits | None = None,
        keep_versions: int | None = None,
        reclaim: Callable[[Callable[[], None]], object] = _run,
    ) -> None:
        """Opens or creates the store in `root`, for serving the base with this fingerprint.

        `reclaim` runs the removal of bytes that nobody uses any more; by default the thread that gave the last lease
        back does it.

        Raises:
            StoreBusy: another process has it open.
            StoreDamaged: it is of another schema, or no store.
        """
        self.base_fingerprint = base_fingerprint
        self.limits = limits or StageLimits()
        self.keep_versions = keep_versions  # newest versions of each adapter that retention keeps; None: all
        self.aliases = AliasBook()
        self.upkeep = Upkeep()
        self.leases = LeaseBook()
        self._reclaim = reclaim
        self._changing = threading.RLock()  # held through a change, fsyncs included
        self._reading = threading.Lock()  # held for the moment of touching the index
        self._layout = Layout(root)
        try:
            self.shelf = ImageShelf(self._layout.images)
            self._index: Index = open_index(self._layout, self.shelf, base_fingerprint)
        except BaseException:
            self._layout.close()
            raise

    def close(self) -> None:
        """Lets another process open the store. Again is harmless."""
        with self._changing:
            self._layout.close()

    # ------------------------------------------------------------------ reading

    @property
    def root(self) -> Path:
        """The store's directory."""
        return self._layout.root

    def look_up(self, reference: Reference, key: str | None = None) -> AdapterVersion:
        """The version that a reference means now. Raises AdapterNotFound, AliasNotFound, VersionNotFound.

        Where an alias shares several versions, the same `key` always gets the same one; without it chance decides.
        """
        with self._reading:
            return self._index.look_up(reference)

    def lease(self, reference: Reference, key: str | None = None) -> Lease:
        """As `look_up`, and holds the version's bytes until the lease is released."""
        with self._reading:
            return self.leases.take(self._index.look_up(reference))

    def record(self, name: str) -> AdapterRecord:
        """Raises AdapterNotFound."""
        with self._reading:
            return self._index.record(name)

    def page(self, prefix: str = "", limit: int = 100, after: str = "") -> Page:
        """Up to `limit` adapters whose names begin with `prefix`, sorted by name, from behind `after`."""
        with self._reading:
            names = self._index.names(prefix, after, limit + 1)
            records = [self._index.record(name) for name in names[:limit]]
        return Page(records, names[limit - 1] if len(names) > limit else None)

    def find_content(self, name: str, manifest_digest: str) -> AdapterVersion | None:
        """The version of `name` that has exactly these files and was checked against this base."""
        with self._reading:
            return self._index.find_content(name, manifest_digest, self.base_fingerprint)

    @property
    def num_adapters(self) -> int:
        return self._index.num_adapters

    def num_by_state(self) -> Counter[VersionState]:
        """Names by the state of what each bare name means; costs nothing for names that have not changed."""
        with self._reading:
            return self._index.num_by_state()

    def names_using(self, effect_digests: Iterable[str]) -> list[str]:
        """Names, sorted, with a version of one of these effects."""
        with self._reading:
            return sorted(self._index.names_using(effect_digests))

    def files_of(self, version: AdapterVersion) -> Mapping[str, Path]:
        """Where the version's files lie: relative path -> blob. Readable as long as a lease is held."""
        return {file.path: self._layout.blob_path(file.sha256) for file in version.files}

    def find_image(self, version: AdapterVersion, variant: str) -> StoredImage | None:
        return self.shelf.find(version.content.effect_digest, variant)

    # ----------------------------------------------------------------- changing

    def stage(self) -> Stage:
        """An empty stage. Raises DiskFull."""
        return Stage(self._layout.staging / uuid.uuid4().hex, self.limits)

    def commit(
        self,
        stage: Stage,
        name: str,
        content: Content,
        source: Source,
        *,
        image: StagedImage | None = None,
        aliases: Iterable[str] = (DEFAULT_ALIAS,),
        create_only: bool = False,
        expect: Expectation | None = None,
    ) -> Committed:
        """Makes the stage's files a version of `name` and moves `aliases` to it, both or neither.

        Files that already are a version (of this name, checked against the same base) make no new one; the aliases
        move to it all the same. The stage stays the caller's to close.

        Raises:
            InvalidName: of `name` or an alias.
            AdapterExists: `create_only`, and the name is taken.
            PreconditionFailed: `expect`, which sees the adapter under the lock of this change, forbids it.
            DiskFull: nothing was committed.
        """
        check_name(name)
        wanted = [check_alias(alias) for alias in aliases]
        assert content.base_fingerprint == self.base_fingerprint, "checked against another base than this store's"
        with self._changing:
            if create_only and self._exists(name):
                raise AdapterExists(f"adapter {name!r} exists, and this upload was to create it.")
            try:
                if image is not None:
                    self.shelf.adopt(content.effect_digest, image)
                self._keep_files(stage)
                known = self.find_content(name, stage.manifest_digest)
                if known is None:
                    return Committed(self._write_version(stage, name, content, source, wanted), created=True)
                return Committed(self._welcome_back(known, wanted), created=False)
            except OSError as error:
                raise_if_full(error)
                raise

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Points an alias to a version, atomically. Raises InvalidName, AdapterNotFound, VersionNotFound."""
        check_alias(alias)
        with self._changing:
            self.look_up(Reference(name, version, None))
            aliases = self.record(name).aliases
            if aliases.get(alias) == version:
                return
            self._write_alias(name, alias, version, aliases.get(alias))
            with self._reading:
                self._index.set_alias(name, alias, version)

    def amend(
        self, name: str, change: Callable[[Attributes], Attributes], *, expect: Expectation | None = None
    ) -> AdapterRecord:
        """Changes labels, description, pins, time to live or retention; `change` sees the present ones, locked.

        Raises AdapterNotFound, PreconditionFailed, InvalidAttribute, DiskFull.
        """
        raise NotImplementedError

    def delete(
        self, name: str, version: int | None = None, *, force: bool = False, expect: Expectation | None = None
    ) -> list[AdapterVersion]:
        """Takes one version, or the whole adapter, out of sight for good; returns what went.

        Bytes are removed once the last lease on them ends. Numbers never come back.

        Raises:
            AdapterNotFound, VersionNotFound: there is nothing to delete.
            PreconditionFailed: `expect`, which sees the adapter under the lock of this change, forbids it.
            AliasInUse: an alias points to this one of several versions, and not `force`: forced, the alias goes too.
        """
        with self._changing:
            record = self.record(name)
            doomed = [item for item in record.versions if version in (None, item.version)]
            if not doomed:
                raise VersionNotFound(f"adapter {name!r} has no version {version}.")
            numbers = {item.version for item in doomed}
            lost = [alias for alias, number in record.aliases.items() if number in numbers]
            if lost and not force and len(doomed) < len(record.versions):
                raise AliasInUse(
                    f"{name}@{version} is what the alias {lost[0]!r} points to. Move the alias to another version "
                    "first, or force the deletion and lose the alias."
                )
            gone = self._index.entry(name).gone | numbers
            write_json(self._layout.tombstone_path(name), {"versions": sorted(gone)})
            for alias in lost:
                remove(self._layout.alias_path(name, alias))
            with self._reading:
                for item in doomed:
                    self._index.hide(item)
        for item in doomed:
            purge = functools.partial(self._purge, item)
            self.leases.when_idle(name, item.version, functools.partial(self._reclaim, purge))
        return doomed

    def keep_image(self, version: AdapterVersion, image: StagedImage) -> StoredImage:
        """Takes over a packed image of a committed version (leased by the caller)."""
        with self._changing:
            return self.shelf.adopt(version.content.effect_digest, image)

    def mark(self, version: AdapterVersion, state: VersionState, reason: str | None = None) -> None:
        """Sets how a version can be used, in this process and until it ends."""
        with self._reading:
            self._index.set_state(version, state, reason)

    # ------------------------------------------------------------------ private

    def _exists(self, name: str) -> bool:
        with self._reading:
            return name in self._index.names(name, "", 1)

    def _keep_files(self, stage: Stage) -> None:
        for file in stage.files:
            blob = self._layout.blob_path(file.sha256)
            if not (blob.exists() and blob.stat().st_size == file.size):
                move_file(stage.path_of(file.path), blob)

    def _welcome_back(self, known: AdapterVersion, aliases: list[str]) -> AdapterVersion:
        """The version whose content was committed again: served again if its bytes had been lost."""
        for alias in aliases:
            self.set_alias(known.name, alias, known.version)
        self.mark(known, VersionState.READY)
        return self.look_up(Reference(known.name, known.version, None))

    def _write_version(
        self, stage: Stage, name: str, content: Content, source: Source, aliases: list[str]
    ) -> AdapterVersion:
        with self._reading:
            entry = self._index.entry(name)
            entry.last_number += 1  # given out once, even if what follows fails
            number = entry.last_number
            before = dict(entry.aliases)
        version = AdapterVersion(name, number, _now(), stage.manifest_digest, stage.files, source, content)
        try:
            for alias in aliases:
                self._write_alias(name, alias, number, before.get(alias))
            make_directory(self._layout.version_path(name, number).parent)
            write_json(self._layout.version_path(name, number), version.to_json())
        except Exception:
            for alias in aliases:
                self._restore_alias(name, alias, before.get(alias))
            raise
        with self._reading:
            self._index.add(version)
            for alias in aliases:
                self._index.set_alias(name, alias, number)
        return version

    def _write_alias(self, name: str, alias: str, version: int, previous: int | None) -> None:
        """While `version` is not committed, the alias on disk still means `previous`."""
        path = self._layout.alias_path(name, alias)
        make_directory(path.parent)
        write_json(path, {"version": version, "previous": previous})

    def _restore_alias(self, name: str, alias: str, version: int | None) -> None:
        path = self._layout.alias_path(name, alias)
        try:
            if version is None:
                remove(path)
            else:
                write_json(path, {"version": version, "previous": None})
        except (OSError, StoreError):
            return  # on disk it still means `version`: the number it points to was never committed

    def _purge(self, version: AdapterVersion) -> None:
        with self._changing:
            if not self._layout.is_open:
                return  # the next opening finishes it
            with self._reading:
                blobs, effect = self._index.forget(version)
            try:
                remove(self._layout.version_path(version.name, version.version))
                for sha256 in blobs:
                    remove(self._layout.blob_path(sha256))
                if effect is not None:
                    self.shelf.discard(effect)
            except OSError as error:  # the tombstone stands, so the next opening tries again
                logger.error("the bytes of %s, deleted, could not all be removed: %s", version, error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
