"""Reads a whole store from its files and says what is wrong: `veneer adapters fsck`.

Safe while servers run on the store. Without `repair` nothing is changed; with it, what can be put right is, and what
cannot be is left for a backup or a new upload.

    record_damaged, tombstone_damaged    never repaired: what they speak of is not known
    alias_damaged, attributes_damaged    repaired by removal
    alias_dangling, leftover, blob_stray, upload_dead, change_unfinished    repaired
    blob_missing, blob_damaged           a damaged one is removed, so that the next upload of its files heals it
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters_store.alias import Alias
from adapters_store.attributes import Attributes
from adapters_store.catalog import Catalog
from adapters_store.durable import is_temporary, read_json, remove
from adapters_store.errors import StoreDamaged, StoreUnusable
from adapters_store.journal import Journal
from adapters_store.layout import Layout
from adapters_store.locks import StoreLocks
from adapters_store.on_disk import OnDisk, read_name
from adapters_store.record import StoredFile
from adapters_store.schema import MARKER

_REMOVABLE = ("alias_damaged", "attributes_damaged", "blob_damaged")


@dataclass(frozen=True, slots=True)
class Finding:
    code: str
    subject: str  # "sql@3", "sql@prod" or a path relative to the store
    message: str
    repaired: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "subject": self.subject, "message": self.message, "repaired": self.repaired}


@dataclass(frozen=True, slots=True)
class Checkup:
    num_adapters: int
    num_versions: int
    num_bytes: int  # of blobs
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong, or everything that was has been repaired."""
        return all(finding.repaired for finding in self.findings)


def check(root: Path, *, repair: bool = False, read_bytes: bool = True) -> Checkup:
    """Checks the store in `root`; with `read_bytes` every blob is hashed.

    Raises:
        StoreUnusable: there is no store, it is of a newer schema, or stays locked.
    """
    if not (root / MARKER).exists():
        raise StoreUnusable(f"{root} is no adapter store.")
    layout = Layout(root)
    try:
        before = _Examination(layout, read_bytes).run()
        if not repair or not before.findings:
            return before
        _repair(layout, before.findings)
        after = _Examination(layout, read_bytes=False).run()
    finally:
        layout.close()
    left = {(finding.code, finding.subject) for finding in after.findings}
    told = (replace(item, repaired=_is_repaired(item, left)) for item in before.findings)
    return replace(after, findings=tuple(told))


def _is_repaired(finding: Finding, left: set[tuple[str, str]]) -> bool:
    return not finding.code.startswith("blob_d") and (finding.code, finding.subject) not in left


def _repair(layout: Layout, findings: tuple[Finding, ...]) -> None:
    """What opening a store settles is settled by opening it; the rest is removed first."""
    catalog = Catalog(layout.root, base_fingerprint="")
    try:
        with catalog.exclusively():
            for finding in findings:
                if finding.code in _REMOVABLE:
                    remove(layout.root / finding.subject)
        catalog.settle()
        catalog.upkeep.collect()
    finally:
        catalog.close()


class _Examination:
    def __init__(self, layout: Layout, read_bytes: bool) -> None:
        self._layout = layout
        self._read_bytes = read_bytes
        self._sizes: dict[str, int] = {}  # of blobs that were looked at
        self._num_versions = 0
        self._num_adapters = 0

    def run(self) -> Checkup:
        findings = list(self._examine())
        return Checkup(self._num_adapters, self._num_versions, sum(self._sizes.values()), tuple(findings))

    def _examine(self) -> Iterator[Finding]:
        locks = StoreLocks(self._layout.locks)
        try:
            used: set[str] = set()
            is_whole = True
            for name in self._layout.names():
                disk = read_name(self._layout, name, {})
                is_whole = is_whole and not disk.damaged and not disk.is_damaged
                used.update(file.sha256 for version in disk.versions.values() for file in version.files)
                yield from self._examine_name(name, disk, locks)
            unfinished = Journal(self._layout.changes).unfinished
            if unfinished is not None:
                yield Finding("change_unfinished", unfinished, "a change was cut short, or is under way.")
            yield from self._find_strays(used if is_whole else None, locks)
        finally:
            locks.close()

    def _examine_name(self, name: str, disk: OnDisk, locks: StoreLocks) -> Iterator[Finding]:
        layout = self._layout
        for number in sorted(disk.damaged):
            yield Finding("record_damaged", f"{name}@{number}", "its record cannot be read. Restore it from a backup.")
        if disk.is_damaged:
            yield from self._find_damage(name)
        for alias in disk.unsettled():
            yield Finding("alias_dangling", f"{name}@{alias}", "it points to a version that is not there.")
        visible = [version for number, version in disk.versions.items() if number not in disk.gone]
        self._num_adapters += bool(visible)
        self._num_versions += len(visible)
        if not visible and not disk.damaged and disk.attributes != Attributes():
            yield Finding("leftover", self._relative(layout.attributes_path(name)), "its adapter is deleted.")
        for number in sorted(disk.versions.keys() & disk.gone):
            with locks.tried(f"{name}@{number}") as is_free:
                if is_free:
                    yield Finding("leftover", f"{name}@{number}", "it is deleted, held by nobody, and still there.")
        for version in visible:
            for file in version.files:
                yield from self._examine_blob(str(version), file)

    def _find_damage(self, name: str) -> Iterator[Finding]:
        layout = self._layout
        try:
            layout.read_tombstone(name)
        except StoreDamaged as error:
            yield Finding("tombstone_damaged", self._relative(layout.tombstone_path(name)), str(error))
        alias_paths = [layout.alias_path(name, alias) for alias in layout.alias_names(name)]
        for path in alias_paths:
            try:
                Alias.from_json(read_json(path))
            except (StoreDamaged, OSError) as error:
                yield Finding("alias_damaged", self._relative(path), str(error))
        path = layout.attributes_path(name)
        try:
            Attributes.from_json(read_json(path)) if path.exists() else None
        except (StoreDamaged, OSError) as error:
            yield Finding("attributes_damaged", self._relative(path), str(error))

    def _examine_blob(self, version: str, file: StoredFile) -> Iterator[Finding]:
        if file.sha256 in self._sizes:
            return
        path = self._layout.blob_path(file.sha256)
        try:
            size = path.stat().st_size
        except OSError:
            yield Finding("blob_missing", version, f"the bytes of {file.path} are gone. Upload it again.")
            return
        self._sizes[file.sha256] = size
        if size != file.size or (self._read_bytes and _digest(path) != file.sha256):
            yield Finding(
                "blob_damaged", self._relative(path), f"it is not what was committed as {file.path} of {version}."
            )

    def _find_strays(self, used: set[str] | None, locks: StoreLocks) -> Iterator[Finding]:
        """`used` is None where records cannot be read: then nothing may be called unused."""
        for path in sorted(self._layout.blobs.iterdir()):
            if is_temporary(path.name) or (used is not None and path.name not in used):
                yield Finding("blob_stray", self._relative(path), "no version has it.")
        if used is not None:
            yield from self._find_stray_rules()
        for path in self._layout.temporary_files():
            yield Finding("leftover", self._relative(path), "it was being written, or is.")
        for path in sorted(self._layout.staging.iterdir()):
            with locks.tried(path.name.partition("-")[0]) as is_dead:
                if is_dead:
                    yield Finding("upload_dead", self._relative(path), "the process that began it is no more.")

    def _find_stray_rules(self) -> Iterator[Finding]:
        for name in self._layout.names_with_rules():
            disk = read_name(self._layout, name, {})
            if not disk.versions.keys() - disk.gone:
                where = self._relative(self._layout.rules_directory(name))
                yield Finding("leftover", where, "gates and canaries of an adapter that is deleted.")

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self._layout.root))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
