"""Writes the files of a commit in the order in which a crash between any two of them does no harm.

All of it under the lock of changes and between the notices of one, see `Holdings`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from adapters_store.alias import Alias
from adapters_store.durable import create_file, json_bytes, make_directory, move_file, remove, write_json
from adapters_store.errors import StoreError
from adapters_store.holdings import now
from adapters_store.layout import Layout
from adapters_store.on_disk import OnDisk
from adapters_store.record import AdapterVersion, Content, Source
from adapters_store.staging import Stage

logger = logging.getLogger(__name__)


class Pen:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def keep_files(self, stage: Stage) -> None:
        """Moves a stage's files among the blobs; content that is there already stays."""
        for file in stage.files:
            blob = self._layout.blob_path(file.sha256)
            if not (blob.exists() and blob.stat().st_size == file.size):
                move_file(stage.path_of(file.path), blob)

    def write_version(
        self, stage: Stage, name: str, content: Content, source: Source, aliases: list[str], disk: OnDisk
    ) -> int:
        """The commit; returns the number. Until its file is there, aliases that point to it mean what they meant."""
        files, digest = stage.files, stage.manifest_digest
        number = disk.last_number + 1
        make_directory(self._layout.version_path(name, number).parent)
        while True:
            version = AdapterVersion(name, number, now(), digest, files, source, content)
            path = self._layout.version_path(name, number)
            try:
                self.write_aliases(name, aliases, number, disk.aliases)
                create_file(path, json_bytes(version.to_json()))
            except FileExistsError:  # only where locks do not reach another host: its version stays, ours is the next
                number += 1
            except Exception:
                remove(path)
                self.trim_aliases(name, {alias: disk.aliases.get(alias) for alias in aliases})
                raise
            else:
                return number

    def write_aliases(self, name: str, aliases: Iterable[str], version: int, before: Mapping[str, Alias]) -> None:
        for alias in aliases:
            path = self._layout.alias_path(name, alias)
            known = before.get(alias)
            if known is None or known.weights.keys() != {version}:
                make_directory(path.parent)
                write_json(path, (Alias({version: 1}) if known is None else known.moved({version: 1}, now())).to_json())

    def trim_aliases(self, name: str, meanings: Mapping[str, Alias | None]) -> None:
        """Writes what aliases mean now; None: nothing. What fails is settled by the next change of the name."""
        for alias, meaning in meanings.items():
            path = self._layout.alias_path(name, alias)
            try:
                if meaning is None:
                    remove(path)
                else:
                    write_json(path, meaning.to_json())
            except (OSError, StoreError) as error:
                logger.warning("the alias %s@%s is settled later: %s", name, alias, error)
