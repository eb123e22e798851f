"""Moves the aliases of a store's adapters: to one version, to several by weight, and back.

    catalog.aliases.set("sql", "prod", 3)                 everyone gets sql@3
    catalog.aliases.weigh("sql", "prod", {3: 90, 4: 10})  one of ten gets sql@4
    catalog.aliases.roll_back("sql", "prod")              what it meant before, in one step

Each is one rename of a small file. `expect`, where given, sees the adapter as it is under the lock of the change, and
raises (PreconditionFailed) to forbid it.
"""

from __future__ import annotations

from adapters_store.alias import Alias, Weights
from adapters_store.record import Expectation


class AliasBook:
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
        raise NotImplementedError

    def remove(self, name: str, alias: str, *, expect: Expectation | None = None) -> None:
        """Forgets an alias with its history. Raises AdapterNotFound, AliasNotFound, PreconditionFailed."""
        raise NotImplementedError

    def roll_back(self, name: str, alias: str = "default", *, expect: Expectation | None = None) -> Alias:
        """Gives an alias its newest earlier meaning whose versions are all still there.

        What it meant last is dropped, not remembered: rolling back twice goes back two moves.

        Raises:
            AdapterNotFound, AliasNotFound, PreconditionFailed, DiskFull.
            NothingToRollBack: no earlier meaning is left.
        """
        raise NotImplementedError
