"""What has to hold before and after an alias moves: one small file an alias, beside what the alias means.

    rules/<name>/<alias>.json    {"gate": {...} or null, "canary": {...} or null}

Opaque here, as load reports are: whoever writes a rule knows how to read it. They are written under the lock of changes
and read without it, from their files each time: other processes may change them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adapters_store.durable import make_directory, raise_if_full, read_json, remove, write_json
from adapters_store.errors import AdapterNotFound
from adapters_store.holdings import Holdings
from adapters_store.record import Expectation


class AliasKey(NamedTuple):
    name: str
    alias: str

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


class AliasRules:
    """The rules of one store. A deletion of an adapter takes its rules with it."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._layout = holdings.layout

    def read(self, key: AliasKey) -> dict[str, Any]:
        """The rules of an alias by kind; empty when it has none. Raises StoreDamaged."""
        try:
            return read_json(self._path(key))
        except FileNotFoundError:
            return {}

    def write(
        self, key: AliasKey, kind: str, rule: Mapping[str, Any] | None, *, expect: Expectation | None = None
    ) -> None:
        """Sets one rule and leaves the others; None takes it away.

        Raises:
            AdapterNotFound: there is no adapter to set it for, or to take it from.
            PreconditionFailed: `expect`, which sees the adapter under the lock of this change, forbids it.
            DiskFull, StoreDamaged: the rules are what they were.
        """
        with self._holdings.changing():
            record = self._holdings.record(key.name)
            if expect is not None:
                expect(record)
            if record is None:
                raise AdapterNotFound(f"there is no adapter {key.name!r}.")
            rules = {**self.read(key), kind: rule}
            kept = {kind: rule for kind, rule in rules.items() if rule is not None}
            try:
                self._put(self._path(key), kept)
            except OSError as error:
                raise_if_full(error)
                raise

    def all(self, kind: str) -> Iterator[tuple[AliasKey, dict[str, Any]]]:
        """Every rule of one kind. Raises StoreDamaged."""
        for name in self._layout.names_with_rules():
            for path in sorted(self._layout.rules_directory(name).glob("*.json")):
                key = AliasKey(name, path.stem)
                rule = self.read(key).get(kind)  # gone since the directory was listed, maybe
                if rule is not None:
                    yield key, rule

    def _put(self, path: Path, rules: Mapping[str, Any]) -> None:
        if not rules:
            remove(path)
            return
        make_directory(path.parent)
        write_json(path, rules)

    def _path(self, key: AliasKey) -> Path:
        return self._layout.rules_directory(key.name) / f"{key.alias}.json"
