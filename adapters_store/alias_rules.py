"""What has to hold before and after an alias moves: one small file an alias, beside what the alias means.

    rules/<name>/<alias>.json    {"gate": {...} or null, "canary": {...} or null}

Opaque here, as load reports are: whoever writes a rule knows how to read it. A slash in a name is written `%2F`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adapters_store.durable import make_directory, read_json, remove, remove_tree, write_json

DIRECTORY = "rules"


class AliasKey(NamedTuple):
    name: str
    alias: str

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


class AliasRules:
    """The rules of the store in `root`, read from their files each time: other processes may change them."""

    def __init__(self, root: Path) -> None:
        self._directory = root / DIRECTORY

    def read(self, key: AliasKey) -> dict[str, Any]:
        """The rules of an alias by kind; empty when it has none. Raises StoreDamaged."""
        path = self._path(key)
        return read_json(path) if path.exists() else {}

    def write(self, key: AliasKey, kind: str, rule: Mapping[str, Any] | None) -> None:
        """Sets one rule and leaves the others; None takes it away. Raises DiskFull, StoreDamaged."""
        rules = {**self.read(key), kind: rule}
        kept = {kind: rule for kind, rule in rules.items() if rule is not None}
        if not kept:
            remove(self._path(key))
            return
        make_directory(self._path(key).parent)
        write_json(self._path(key), kept)

    def forget(self, name: str) -> None:
        """An adapter was deleted: whoever takes its name later starts without its rules."""
        remove_tree(self._directory / _encode(name))

    def all(self, kind: str) -> Iterator[tuple[AliasKey, dict[str, Any]]]:
        """Every rule of one kind. Raises StoreDamaged."""
        if not self._directory.is_dir():
            return
        for entry in os.scandir(self._directory):
            for path in sorted(Path(entry.path).glob("*.json")):
                rule = read_json(path).get(kind)
                if rule is not None:
                    yield AliasKey(entry.name.replace("%2F", "/"), path.stem), rule

    def _path(self, key: AliasKey) -> Path:
        return self._directory / _encode(key.name) / f"{key.alias}.json"


def _encode(name: str) -> str:
    return name.replace("/", "%2F")
