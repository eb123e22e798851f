"""The adapters that a store holds: committed versions, the aliases that point to them, the leases on them.

    stage = catalog.stage()                       an upload begins; nothing of it counts yet
    catalog.commit(stage, "sql", content, ...)    sql@1 exists, and the alias `default` points to it
    with catalog.lease(parse_reference("sql")) as lease: ...      sql@1 stays on disk, whatever happens to its name
    catalog.delete("sql")                         gone for new requests; bytes go with the last lease

Every change is one rename or link of a small file, so a crash leaves what was committed and nothing else. The catalogue
does not look inside files: whoever commits has checked them and brings the effect digest.

Processes, on several hosts too, share a store: changes wait for each other, reading does not wait for them and sees
what others did. Any thread may call.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from adapters_store.alias_book import AliasBook
from adapters_store.alias_rules import AliasRules
from adapters_store.attributes import Attributes, check_attributes
from adapters_store.durable import make_directory, raise_if_full, remove, remove_tree, write_json
from adapters_store.errors import AdapterExists, AdapterNotFound, AdapterPinned, AliasInUse, VersionNotFound
from adapters_store.fitness import judge
from adapters_store.holdings import Holdings
from adapters_store.images import ImageShelf, StagedImage, StoredImage
from adapters_store.index import READY
from adapters_store.leases import Lease, LeaseBook
from adapters_store.names import DEFAULT_ALIAS, Reference, check_alias, check_name
from adapters_store.pen import Pen
from adapters_store.record import AdapterRecord, AdapterVersion, Content, Expectation, Source, VersionState
from adapters_store.staged_bytes import StagedBytes
from adapters_store.staging import Stage, StageLimits
from adapters_store.upkeep import Upkeep

logger = logging.getLogger(__name__)


class Committed(NamedTuple):
    version: AdapterVersion
    created: bool  # False: this content was a version already


class Page(NamedTuple):
    records: list[AdapterRecord]
    next_after: str | None  # pass as `after` for the next page; None at the end


def _run(job: Callable[[], object]) -> None:
    job()


class Catalog:
    def __init__(
        self,
        root: Path,
        base_fingerprint: str,
        *,
        limits: StageLimits | None = None,
        keep_versions: int | None = None,
        reclaim: Callable[[Callable[[], object]], object] = _run,
    ) -> None:
        """Opens or creates the store in `root`, for serving the base with this fingerprint.

        `reclaim` runs the removal of bytes that nobody uses any more; by default the thread that gave the last lease
        back does it. `keep_versions` is how many versions of an adapter retention keeps; None keeps all.

        Raises:
            StoreBusy: a process of an older release has it open, or a change takes too long.
            StoreDamaged: it is of a newer schema, or no store.
        """
        self.base_fingerprint = base_fingerprint
        self.limits = limits or StageLimits()
        self.staged = StagedBytes(self.limits.max_staged_bytes)
        self._holdings = Holdings(root, functools.partial(judge, base_fingerprint=base_fingerprint))
        self._layout = self._holdings.layout
        self._pen = Pen(self._layout)
        self._reclaim = reclaim
        self.leases = LeaseBook(self._holdings.locks, self._reclaim_if_deleted)
        self.aliases = AliasBook(self._holdings)
        self.rules = AliasRules(self._holdings)
        self.upkeep = Upkeep(self._holdings, self.delete, keep_versions)
        self._holdings.settle_all(again=False)
        self.upkeep.collect()

    def close(self) -> None:
        """Ends this process's use of the store. Again is harmless."""
        self._holdings.close()

    # ------------------------------------------------------------------ reading

    @property
    def root(self) -> Path:
        """The store's directory."""
        return self._layout.root

    @property
    def shelf(self) -> ImageShelf:
        return self._holdings.shelf

    def look_up(self, reference: Reference, key: str | None = None) -> AdapterVersion:
        """The version that a reference means now. Raises AdapterNotFound, AliasNotFound, VersionNotFound.

        Where an alias shares several versions, the same `key` always gets the same one; without it chance decides.
        """
        with self._holdings.reading() as index:
            return index.look_up(reference, key)

    def lease(self, reference: Reference, key: str | None = None) -> Lease:
        """As `look_up`, and holds the version's bytes until the lease is released."""
        with self._holdings.reading() as index:
            version = index.look_up(reference, key)
            lease = self.leases.take(version)
        return self._checked(version, lease)

    def lease_at_once(self, reference: Reference, key: str | None = None) -> Lease | None:
        """As `lease`; None where that would wait for a thread, or read what other processes changed."""
        with self._holdings.glancing() as index:
            if index is None:
                return None
            version = index.look_up(reference, key)
            lease = self.leases.take(version)
        return self._checked(version, lease)

    def _checked(self, version: AdapterVersion, lease: Lease | None) -> Lease:
        """The lease, if the version's record is still there. Raises VersionNotFound."""
        if lease is not None and self._layout.version_path(version.name, version.version).exists():
            return lease
        if lease is not None:
            lease.release()
        raise VersionNotFound(f"{version} has just been deleted.")

    def record(self, name: str) -> AdapterRecord:
        """Raises AdapterNotFound."""
        with self._holdings.reading() as index:
            return index.record(name)

    def page(self, prefix: str = "", limit: int = 100, after: str = "") -> Page:
        """Up to `limit` adapters whose names begin with `prefix`, sorted by name, from behind `after`."""
        with self._holdings.reading() as index:
            names = index.names(prefix, after, limit + 1)
            records = [index.record(name) for name in names[:limit]]
        return Page(records, names[limit - 1] if len(names) > limit else None)

    def find_content(self, name: str, manifest_digest: str) -> AdapterVersion | None:
        """The version of `name` that has exactly these files and was checked against this base."""
        with self._holdings.reading() as index:
            return index.find_content(name, manifest_digest, self.base_fingerprint)

    @property
    def num_adapters(self) -> int:
        with self._holdings.reading() as index:
            return index.num_adapters

    def num_by_state(self) -> Counter[VersionState]:
        """Names by the state of what each bare name means; costs nothing for names that have not changed."""
        with self._holdings.reading() as index:
            return index.num_by_state()

    def names_using(self, effect_digests: Iterable[str]) -> list[str]:
        """Names, sorted, with a version of one of these effects."""
        with self._holdings.reading() as index:
            return sorted(index.names_using(effect_digests))

    def files_of(self, version: AdapterVersion) -> Mapping[str, Path]:
        """Where the version's files lie: relative path -> blob. Readable as long as a lease is held."""
        return {file.path: self._layout.blob_path(file.sha256) for file in version.files}

    def find_image(self, version: AdapterVersion, variant: str) -> StoredImage | None:
        return self.shelf.find(version.content.effect_digest, variant)

    # ----------------------------------------------------------------- changing

    def stage(self) -> Stage:
        """An empty stage. Raises DiskFull."""
        return Stage(self._holdings.new_stage(), self.limits, self.staged)

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
        with self._holdings.changing(name) as disk:
            record = self._holdings.record(name)
            if create_only and record is not None:
                raise AdapterExists(f"adapter {name!r} exists, and this upload was to create it.")
            if expect is not None:
                expect(record)
            try:
                with self._holdings.announced(name):
                    if image is not None:
                        self.shelf.adopt(content.effect_digest, image)
                    self._pen.keep_files(stage)
                    known = self._find_committed(record, stage.manifest_digest)
                    if known is None:
                        number = self._pen.write_version(stage, name, content, source, wanted, disk)
                    else:
                        number = known.version
                        self._pen.write_aliases(name, wanted, number, disk.aliases)
            except OSError as error:
                raise_if_full(error)
                raise
        if known is not None:
            self.mark(known, VersionState.READY)  # served again if its bytes had been lost
        else:
            self.upkeep.prune(name)
        return Committed(self.look_up(Reference(name, number, None)), created=known is None)

    def amend(
        self, name: str, change: Callable[[Attributes], Attributes], *, expect: Expectation | None = None
    ) -> AdapterRecord:
        """Changes labels, description, pins, time to live or retention; `change` sees the present ones, locked.

        Raises AdapterNotFound, PreconditionFailed, InvalidAttribute, DiskFull.
        """
        with self._holdings.changing(name) as disk:
            record = self._holdings.record(name)
            if expect is not None:
                expect(record)
            if record is None:
                raise AdapterNotFound(f"there is no adapter {name!r}.")
            wanted = check_attributes(change(disk.attributes))
            if wanted != disk.attributes:
                with self._holdings.announced(name):
                    make_directory(self._layout.attributes)
                    write_json(self._layout.attributes_path(name), wanted.to_json())
        return self.record(name)

    def delete(
        self, name: str, version: int | None = None, *, force: bool = False, expect: Expectation | None = None
    ) -> list[AdapterVersion]:
        """Takes one version, or the whole adapter, out of sight for good; returns what went.

        Bytes are removed once the last lease on them ends. Numbers never come back.

        Raises:
            AdapterNotFound, VersionNotFound: there is nothing to delete.
            PreconditionFailed: `expect`, which sees the adapter under the lock of this change, forbids it.
            AliasInUse: an alias points to this one of several versions, and not `force`: forced, the alias goes too.
            AdapterPinned: it, or one of its versions, is pinned, and not `force`.
        """
        with self._holdings.changing(name) as disk:
            record = self._holdings.record(name)
            if expect is not None:
                expect(record)
            if record is None:
                raise AdapterNotFound(f"there is no adapter {name!r}.")
            doomed = [item for item in record.versions if version in (None, item.version)]
            if not doomed:
                raise VersionNotFound(f"adapter {name!r} has no version {version}.")
            pinned = [item for item in doomed if record.is_pinned(item.version)]
            if pinned and not force:
                raise AdapterPinned(f"{pinned[0]} is pinned. Take the pin away first, or force the deletion.")
            is_whole = len(doomed) == len(record.versions)
            numbers = {item.version for item in doomed}
            lost = {alias: route for alias, route in record.routes.items() if numbers & route.weights.keys()}
            if lost and not force and not is_whole:
                raise AliasInUse(
                    f"{name}@{version} is what the alias {next(iter(lost))!r} points to. Move the alias to another "
                    "version first, or force the deletion and lose the alias."
                )
            with self._holdings.announced(name):
                write_json(self._layout.tombstone_path(name), {"versions": sorted(disk.gone | numbers)})
                self._pen.trim_aliases(name, {alias: route.without(numbers) for alias, route in lost.items()})
                if is_whole:
                    remove(self._layout.attributes_path(name))
                    remove_tree(self._layout.rules_directory(name))
        for item in doomed:
            if not self.leases.count(name, item.version):
                self._reclaim(functools.partial(self.upkeep.purge, item))
        return doomed

    def keep_image(self, version: AdapterVersion, image: StagedImage) -> StoredImage:
        """Takes over a packed image of a committed version (leased by the caller)."""
        with self._holdings.changing():
            return self.shelf.adopt(version.content.effect_digest, image)

    def mark(self, version: AdapterVersion, state: VersionState, reason: str | None = None) -> None:
        """Sets how a version can be used, in this process and until it ends."""
        with self._holdings.reading() as index:
            index.set_mark(version, READY if state is VersionState.READY else (state, reason))

    def exclusively(self) -> AbstractContextManager[object]:
        """A block in which nobody else changes the store. Raises StoreBusy."""
        return self._holdings.changing()

    def settle(self) -> None:
        """Reads every file again, as if nothing were known, and writes down what a crash left half said."""
        self._holdings.settle_all()

    # ------------------------------------------------------------------ private

    def _reclaim_if_deleted(self, version: AdapterVersion) -> None:
        if not self._layout.is_open:
            return  # whoever opens the store next finishes it
        with self._holdings.reading() as index:
            is_hidden = index.is_hidden(version)
        if is_hidden:
            self._reclaim(functools.partial(self.upkeep.purge, version))

    def _find_committed(self, record: AdapterRecord | None, manifest_digest: str) -> AdapterVersion | None:
        return None if record is None else self.find_content(record.name, manifest_digest)
