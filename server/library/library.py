"""All adapters of one server: what is uploaded or found, checked, packed, committed, and resolved for a request.

    library = await Library.open(store_dir, loader)
    committed = await library.add(stage, "sql")          files -> checked, packed, committed; or refused with a reason
    with await library.resolve("sql@prod") as lease:     the version that it means now, held until the block ends
        engine.submit(EngineRequest(..., adapter=lease.ticket))

It introduces the store, which knows files, to the loader, which knows adapters. It sees no engine and no HTTP.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from adapters_store.catalog import Catalog, Committed, Page
from adapters_store.errors import AdapterNotFound
from adapters_store.images import StagedImage, StoredImage
from adapters_store.leases import Lease
from adapters_store.names import DEFAULT_ALIAS, check_alias, check_name, parse_reference
from adapters_store.record import AdapterRecord, AdapterVersion, Content, Expectation, Source, VersionState
from adapters_store.staging import Stage, StageLimits
from peft_core.traits import AdapterTraits
from server.engine.request import AdapterTicket
from server.library.check import are_intact, check_files, check_rank
from server.library.directory import AdapterDirectory
from server.library.errors import AdapterUnusable
from server.library.lease import AdapterLease, ticket_of
from server.library.obtain import obtain, open_stage
from server.library.pins import Pins
from server.library.probe import Probe
from server.library.registrar import Discovered, OnEach, Registrar
from server.library.releases import Releases
from server.library.shared_work import SharedWork
from server.loader.errors import AdapterRefused
from server.loader.job import Loader, Prepared, PrepareJob

_CHUNK = 1000  # records looked at in one go where only some are wanted
_IMAGE_FILE = "packed.image"  # in a stage; no adapter can hold a file of this name


class Deleted(NamedTuple):
    versions: list[AdapterVersion]
    num_leases_left: int  # requests that still run on them; their bytes go with the last one


class Library:
    """Call from one event loop. What blocks for longer than a look at the catalogue runs in threads or the loader."""

    def __init__(
        self, catalog: Catalog, loader: Loader, *, max_rank: int | None = None, probe: Probe | None = None
    ) -> None:
        self.catalog = catalog
        self._probe = probe
        self._loader = loader
        self._max_rank = max_rank
        self._work = SharedWork()
        self.releases = Releases(catalog)
        self.pins = Pins(catalog, self.ticket)
        self.releases.on_moved = self.pins.sync
        self._registrar = Registrar(catalog, self.add, self.releases.move)

    @classmethod
    async def open(
        cls,
        directory: Path,
        loader: Loader,
        *,
        limits: StageLimits | None = None,
        max_rank: int | None = None,
        probe: Probe | None = None,
        keep_versions: int | None = None,
    ) -> Library:
        """The library over the store in `directory`, for the base that `loader` packs for.

        With a `probe` the report of a new version says how far it moves the base.

        Raises:
            StoreUnusable: the directory is in use, of another schema, or no store.
        """
        cleaner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reclaim")
        base, reclaim = loader.target.fingerprint, cleaner.submit
        opening = functools.partial(
            Catalog, directory, base, limits=limits, keep_versions=keep_versions, reclaim=reclaim
        )
        return cls(await asyncio.to_thread(opening), loader, max_rank=max_rank, probe=probe)

    async def close(self) -> None:
        """Gives up work in progress, ends the loader and lets go of the store. Again is harmless."""
        await self._work.close()
        await self.releases.close()
        await self._loader.close()
        self.catalog.close()

    # -------------------------------------------------------------------- adding

    def stage(self) -> Stage:
        """An empty stage for `add`. Raises DiskFull."""
        return self.catalog.stage()

    async def check(self, stage: Stage) -> Prepared:
        """Everything that `add` does before the commit; the packed image lies in the stage.

        Raises:
            AdapterRefused, UploadRefused: what is wrong with the adapter.
            LoaderUnavailable: try again.
        """
        await asyncio.to_thread(check_files, stage)
        files = {file.path: str(stage.path_of(file.path)) for file in stage.files}
        image_path = str(stage.directory / _IMAGE_FILE)
        prepared = await self._loader.prepare(PrepareJob(files, image_path))
        check_rank(prepared.report, self._max_rank)
        if self._probe is None:
            return prepared
        traits = AdapterTraits.from_json(prepared.report.get("traits", {}))
        ticket = AdapterTicket(prepared.effect_digest, "the adapter", image_path, prepared.num_bytes, traits)
        return replace(prepared, report=await self._probe.add_to(prepared.report, ticket))

    async def add(
        self,
        stage: Stage,
        name: str,
        *,
        source: Source | None = None,
        aliases: Iterable[str] = (DEFAULT_ALIAS,),
        create_only: bool = False,
        expect: Expectation | None = None,
    ) -> Committed:
        """Makes a complete stage a version of `name` and moves `aliases` to it; see `Catalog.commit`.

        The stage is taken over. Once called it runs to its end, even if the caller is cancelled. Two calls with the
        same files and name do the work once.

        Raises:
            InvalidName, AdapterExists, PreconditionFailed, DiskFull: nothing was committed.
            AdapterRefused, UploadRefused, LoaderUnavailable: as `check`.
            GateFailed: the version is committed, and an alias with a gate was not moved to it.
        """
        wanted = source or Source("upload:")
        return await self._work.finish(self._add(stage.take_over(), name, wanted, tuple(aliases), create_only, expect))

    async def _add(
        self,
        stage: Stage,
        name: str,
        source: Source,
        aliases: tuple[str, ...],
        create_only: bool,
        expect: Expectation | None,
    ) -> Committed:
        try:
            check_name(name)
            for alias in aliases:
                check_alias(alias)
            async with self._work.turn(f"{name} {stage.manifest_digest}"):
                known = self.catalog.find_content(name, stage.manifest_digest)
                content, image = (known.content, None) if known is not None else await self._prepare(stage)
                gated = await self.releases.gated(name, aliases)
                free = [alias for alias in aliases if alias not in gated]
                commit = functools.partial(self.catalog.commit, stage, name, content, source)
                committed = await asyncio.to_thread(
                    commit, image=image, aliases=free, create_only=create_only, expect=expect
                )
            await self.releases.promote(committed, gated)
            await self.pins.sync()
            self._registrar.failures.pop(name, None)
            return committed
        finally:
            await asyncio.to_thread(stage.close)

    async def _prepare(self, stage: Stage) -> tuple[Content, StagedImage]:
        prepared = await self.check(stage)
        content = Content(
            effect_digest=prepared.effect_digest,
            base_fingerprint=self.catalog.base_fingerprint,
            base_model=prepared.base_model,
            report=prepared.report,
        )
        return content, StagedImage(stage.directory / _IMAGE_FILE, self._loader.variant, prepared.num_bytes)

    async def register(self, directory: AdapterDirectory) -> Committed:
        """One adapter's directory, see `Registrar.register`."""
        return await self._registrar.register(directory)

    async def discover(self, adapters_dir: Path, on_each: OnEach | None = None) -> Discovered:
        """Every adapter below a directory, see `Registrar.discover`."""
        return await self._registrar.discover(adapters_dir, on_each)

    # --------------------------------------------------------------------- using

    def look_up(self, reference: str, key: str | None = None) -> AdapterVersion:
        """The version that a reference means now; where it means several by weight, the one for `key`, else any.

        Raises InvalidName, NotFound, AdapterUnusable (failed directory).
        """
        parsed = parse_reference(reference)
        try:
            return self.catalog.look_up(parsed, key)
        except AdapterNotFound:
            self._registrar.check(parsed.name)
            raise

    async def resolve(self, reference: str, key: str | None = None) -> AdapterLease:
        """A lease on the version that `look_up` finds, its image in place. Release it when the request ends.

        Raises:
            InvalidName, NotFound: there is no such thing.
            AdapterUnusable: it is there, and cannot be served by this server.
            LoaderUnavailable: its image is missing and could not be packed now; try again.
        """
        parsed = parse_reference(reference)
        try:
            lease = self.catalog.lease_at_once(parsed, key)
            if lease is None:  # other processes changed something, and to read that may take a while
                lease = await obtain(functools.partial(self.catalog.lease, parsed, key), Lease.release)
        except AdapterNotFound:
            self._registrar.check(parsed.name)
            raise
        try:
            return AdapterLease(lease, await self.ensure_image(lease.version))
        except AdapterUnusable:
            self.releases.observe(lease.version.name, lease.version.version, failed=True)
            lease.release()
            raise
        except BaseException:
            lease.release()
            raise

    async def ensure_image(self, version: AdapterVersion) -> StoredImage:
        """The packed image of a leased version; packed again when it is missing. Raises as `resolve`."""
        if version.state is not VersionState.READY:
            raise AdapterUnusable(f"{version} is {version.state}: {version.reason}")
        check_rank(version.content.report, self._max_rank)
        image = self.catalog.find_image(version, self._loader.variant)
        if image is not None:
            return image
        return await self._work.share(version.content.effect_digest, functools.partial(self._rebuild, version))

    async def ticket(self, version: AdapterVersion) -> AdapterTicket:
        """What the engine needs to load a version. Raises as `ensure_image`."""
        return ticket_of(version, await self.ensure_image(version))

    async def _rebuild(self, version: AdapterVersion) -> StoredImage:
        try:
            async with open_stage(self.stage) as stage:
                path = stage.directory / _IMAGE_FILE
                files = {name: str(blob) for name, blob in self.catalog.files_of(version).items()}
                prepared = await self._loader.prepare(PrepareJob(files, str(path)))
                # Another release of the decoders may call the same files by another digest; damaged files are damaged.
                if prepared.effect_digest != version.content.effect_digest and not await asyncio.to_thread(
                    are_intact, self.catalog.files_of(version), version.files
                ):
                    raise AdapterRefused("its files in the store have changed. Upload it again.", code="store_damaged")
                image = StagedImage(path, self._loader.variant, prepared.num_bytes)
                return await asyncio.to_thread(self.catalog.keep_image, version, image)
        except AdapterRefused as error:
            self.catalog.mark(version, VersionState.FAILED, error.message)
            raise AdapterUnusable(f"{version} cannot be served any more: {error.message}") from error

    # ------------------------------------------------------------------- looking

    @property
    def num_adapters(self) -> int:
        """Names with at least one version."""
        return self.catalog.num_adapters

    def page(self, prefix: str = "", limit: int = 100, after: str = "", state: VersionState | None = None) -> Page:
        """Up to `limit` adapters whose names begin with `prefix`, sorted, from behind `after`; failed directories too.

        `state` keeps those whose bare name means a version in that state.
        """
        records: list[AdapterRecord] = []
        next_after: str | None = after
        while next_after is not None and len(records) < limit:
            found, next_after = self._page(prefix, limit if state is None else _CHUNK, next_after)
            records += [record for record in found if state in (None, record.state)]
        if len(records) > limit:
            return Page(records[:limit], records[limit - 1].name)
        return Page(records, next_after)

    def _page(self, prefix: str, limit: int, after: str) -> Page:
        stored, next_after = self.catalog.page(prefix, limit, after)
        records = {record.name: record for record in stored}
        for name, reason in self._registrar.failures.items():
            is_here = name.startswith(prefix) and name > after and (next_after is None or name <= next_after)
            if is_here:
                records[name] = replace(records.get(name, AdapterRecord(name)), failure=reason)
        names = sorted(records)
        if len(names) > limit:
            next_after = names[limit - 1]
        return Page([records[name] for name in names[:limit]], next_after)

    def num_by_state(self) -> Counter[VersionState]:
        """Adapters by the state of what each bare name means, failed directories included."""
        numbers = self.catalog.num_by_state()
        numbers[VersionState.FAILED] += sum(not self._registrar.versions(name) for name in self._registrar.failures)
        return +numbers

    async def show(self, name: str) -> AdapterRecord:
        """One adapter. Raises AdapterNotFound."""
        failure = self._registrar.failures.get(name)
        try:
            return replace(self.catalog.record(name), failure=failure)
        except AdapterNotFound:
            if failure is None:
                raise
            return AdapterRecord(name, failure=failure)

    # ------------------------------------------------------------------ changing

    async def delete(
        self,
        name: str,
        version: int | None = None,
        *,
        force: bool = False,
        drain_timeout_s: float = 0.0,
        expect: Expectation | None = None,
    ) -> Deleted:
        """Takes a version or an adapter out of sight at once, then waits up to `drain_timeout_s` for those who use it.

        Running requests are never cut off: what is left after the wait ends by itself, and its bytes go then.
        Raises as `Catalog.delete`.
        """
        if version is None and name in self._registrar.failures and not self._registrar.versions(name):
            if expect is not None:
                expect(None)
            del self._registrar.failures[name]
            return Deleted([], 0)
        delete = functools.partial(self.catalog.delete, name, version, force=force, expect=expect)
        doomed = await asyncio.to_thread(delete)
        if version is None:
            self._registrar.failures.pop(name, None)
            await self.releases.forget(name)
        if drain_timeout_s > 0:
            await asyncio.wait([asyncio.create_task(self.drained(item)) for item in doomed], timeout=drain_timeout_s)
        return Deleted(doomed, sum(self.catalog.leases.count(name, item.version) for item in doomed))

    async def drained(self, version: AdapterVersion) -> None:
        """Returns once nobody holds the version."""
        loop, idle = asyncio.get_running_loop(), asyncio.Event()
        wake = functools.partial(loop.call_soon_threadsafe, idle.set)
        self.catalog.leases.when_idle(version.name, version.version, wake)
        await idle.wait()
