"""Moves the aliases of a store's adapters: to one version, to several by weight, and back.

    catalog.aliases.set("sql", "prod", 3)                 everyone gets sql@3
    catalog.aliases.weigh("sql", "prod", {3: 90, 4: 10})  one of ten gets sql@4
    catalog.aliases.roll_back("sql", "prod")              what it meant before, in one step

Each is one rename of a small file. `expect`, where given, sees the adapter as it is under the lock of the change, and
raises (PreconditionFailed) to forbid it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from adapters_store.alias import Alias, Weights, check_weights
from adapters_store.durable import make_directory, raise_if_full, remove, sync_directory, write_json
from adapters_store.errors import AdapterNotFound, AliasNotFound, NothingToRollBack, VersionNotFound
from adapters_store.holdings import Holdings, now
from adapters_store.names import check_alias
from adapters_store.record import AdapterRecord, Expectation


class AliasBook:
    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    def set(self, name: str, alias: str, version: int, *, expect: Expectation | None = None) -> Alias:
        """Points an alias to one version. Nothing happens, and nothing is remembered, where it does already.

        Raises:
            InvalidName: of the alias.
            AdapterNotFound, VersionNotFound: there is nothing to point to.
            PreconditionFailed: `expect` forbids it.
            DiskFull: it still means what it meant.
        """
        return self.weigh(name, alias, {version: 1}, expect=expect)

    def weigh(self, name: str, alias: str, weights: Weights, *, expect: Expectation | None = None) -> Alias:
        """Shares an alias among versions: version -> weight, relative to their sum. Raises as `set`, InvalidWeights."""
        check_alias(alias)
        wanted = dict(check_weights(weights))
        with self._changing(name, expect) as record:
            for version in wanted:
                _require_version(record, version)
            known = record.routes.get(alias)
            if known is not None and known.weights == wanted:
                return known
            return self._write(name, alias, Alias(wanted) if known is None else known.moved(wanted, now()))

    def remove(self, name: str, alias: str, *, expect: Expectation | None = None) -> None:
        """Forgets an alias with its history. Raises AdapterNotFound, AliasNotFound, PreconditionFailed."""
        with self._changing(name, expect) as record:
            _require_alias(record, alias)
            with self._holdings.announced(name):
                path = self._holdings.layout.alias_path(name, alias)
                remove(path)
                sync_directory(path.parent)  # or it would be back when the power was

    def roll_back(self, name: str, alias: str = "default", *, expect: Expectation | None = None) -> Alias:
        """Gives an alias its newest earlier meaning whose versions are all still there.

        What it meant last is dropped, not remembered: rolling back twice goes back two moves.

        Raises:
            AdapterNotFound, AliasNotFound, PreconditionFailed, DiskFull.
            NothingToRollBack: no earlier meaning is left.
        """
        with self._changing(name, expect) as record:
            present = _require_alias(record, alias)
            there = {version.version for version in record.versions}
            for position, move in enumerate(present.history):
                if there >= move.weights.keys() and move.weights != present.weights:
                    return self._write(name, alias, Alias(move.weights, present.history[position + 1 :]))
            raise NothingToRollBack(
                f"{name}@{alias} has no earlier meaning whose versions are all still there. Point it to one by hand."
            )

    @contextlib.contextmanager
    def _changing(self, name: str, expect: Expectation | None) -> Iterator[AdapterRecord]:
        with self._holdings.changing(name):
            record = self._holdings.record(name)
            if expect is not None:
                expect(record)
            if record is None:
                raise AdapterNotFound(f"there is no adapter {name!r}.")
            yield record

    def _write(self, name: str, alias: str, meaning: Alias) -> Alias:
        path = self._holdings.layout.alias_path(name, alias)
        with self._holdings.announced(name):
            try:
                make_directory(path.parent)
                write_json(path, meaning.to_json())
            except OSError as error:
                raise_if_full(error)
                raise
        return meaning


def _require_version(record: AdapterRecord, version: int) -> None:
    numbers = [item.version for item in record.versions]
    if version not in numbers:
        told = ", ".join(str(number) for number in numbers[-8:])
        raise VersionNotFound(f"adapter {record.name!r} has no version {version}. It has {told}.")


def _require_alias(record: AdapterRecord, alias: str) -> Alias:
    if alias not in record.routes:
        raise AliasNotFound(f"adapter {record.name!r} has no alias {alias!r}.")
    return record.routes[alias]
