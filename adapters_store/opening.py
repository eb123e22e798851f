"""Finds out what a store holds when it is opened: reads the committed files, finishes what a crash cut short.

version file without tombstone      committed
version file with tombstone         its deletion is finished
alias on a committed version        stands
alias on a number never committed   still means its previous version: the crash came before the commit
blob, image, stage of no version    removed
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

from adapters_store.durable import read_json, remove, write_json
from adapters_store.errors import StoreDamaged
from adapters_store.images import ImageShelf
from adapters_store.index import Index
from adapters_store.layout import Layout
from adapters_store.record import AdapterVersion, VersionState

logger = logging.getLogger(__name__)


def open_index(layout: Layout, shelf: ImageShelf, base_fingerprint: str) -> Index:
    """The index of an exclusively held store; leftovers are swept. Raises StoreDamaged."""
    index = Index()
    for name, gone in layout.find_tombstones():
        entry = index.entry(name)
        entry.gone = gone
        entry.last_number = max(gone, default=0)
    num_damaged = _read_versions(layout, index, base_fingerprint)
    _settle_aliases(layout, index)
    layout.sweep_staging()
    if num_damaged == 0:  # what an unreadable record refers to is unknown, so nothing may be called unused
        _sweep_blobs(layout.blobs, index)
        shelf.keep_only(index.used_effects)
    return index


def _read_versions(layout: Layout, index: Index, base_fingerprint: str) -> int:
    found: list[AdapterVersion] = []
    num_damaged = 0
    for name, number, path in layout.find_versions():
        if number in index.entry(name).gone:
            remove(path)
            continue
        try:
            found.append(AdapterVersion.from_json(read_json(path)))
        except (StoreDamaged, OSError) as error:
            num_damaged += 1
            index.entry(name).last_number = max(index.entry(name).last_number, number)
            logger.error("%s@%d is left out: %s", name, number, error)
    for version in sorted(found, key=lambda version: (version.name, version.version)):
        index.add(_judge(layout, version, base_fingerprint))
    return num_damaged


def _judge(layout: Layout, version: AdapterVersion, base_fingerprint: str) -> AdapterVersion:
    reason = _find_damage(layout, version)
    if reason is not None:
        return replace(version, state=VersionState.FAILED, reason=reason)
    if version.content.base_fingerprint != base_fingerprint:
        return replace(version, state=VersionState.INCOMPATIBLE, reason=_incompatible_reason(version, base_fingerprint))
    return version


def _incompatible_reason(version: AdapterVersion, base_fingerprint: str) -> str:
    return (
        f"{version} was committed for the base {version.content.base_fingerprint[:19]}..., and this server's is "
        f"{base_fingerprint[:19]}.... Upload it again to have it checked against this base."
    )


def _find_damage(layout: Layout, version: AdapterVersion) -> str | None:
    for file in version.files:
        try:
            size = layout.blob_path(file.sha256).stat().st_size
        except OSError:
            return f"the bytes of {file.path} are gone from the store. Upload the adapter again."
        if size != file.size:
            return f"{file.path} has {size} bytes in the store instead of {file.size}. Upload the adapter again."
    return None


def _settle_aliases(layout: Layout, index: Index) -> None:
    for name, alias, content in list(layout.find_aliases()):
        entry = index.entry(name)
        target = _target(content, entry.versions.keys(), entry.gone)
        if target is None:
            remove(layout.alias_path(name, alias))
            continue
        if target != content["version"]:
            write_json(layout.alias_path(name, alias), {"version": target, "previous": None})
        index.set_alias(name, alias, target)


def _target(content: Mapping[str, object], committed: Container[object], gone: frozenset[int]) -> int | None:
    version, previous = content.get("version"), content.get("previous")
    if isinstance(version, int) and version in committed:
        return version
    if version not in gone and isinstance(previous, int) and previous in committed:
        return previous
    return None


def _sweep_blobs(directory: Path, index: Index) -> None:
    for path in list(directory.iterdir()):
        if path.name not in index.used_blobs:
            remove(path)
