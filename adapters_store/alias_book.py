"""Moves the aliases of a store's adapters: to one version, to several by weight, and back.

    catalog.aliases.set("sql", "prod", 3)                 everyone gets sql@3
    catalog.aliases.weigh("sql", "prod", {3: 90, 4: 10})  one of ten gets sql@4
    catalog.aliases.roll_back("sql", "prod")              what it meant before, in one step

Each is one rename of a small file. `expected_etag`, where given, is compared under the same lock as the change is made.
"""

from __future__ import annotations

from adapters_store.alias import Alias, Weights


class AliasBook:
    def set(self, name: str, alias: str, version: int, *, expected_etag: str | None = None) -> Alias:
        """Points an alias to one version. Nothing happens, and nothing is remembered, where it does already.

        Raises:
            InvalidName: of the alias.
            AdapterNotFound, VersionNotFound: there is nothing to point to.
            PreconditionFailed: the adapter's etag is another than `expected_etag`.
            DiskFull: it still means what it meant.
        """
        return self.weigh(name, alias, {version: 1}, expected_etag=expected_etag)

    def weigh(self, name: str, alias: str, weights: Weights, *, expected_etag: str | None = None) -> Alias:
        """Shares an alias among versions: version -> weight, relative to their sum. Raises as `set`, InvalidWeights."""
        raise NotImplementedError

    def remove(self, name: str, alias: str, *, expected_etag: str | None = None) -> None:
        """Forgets an alias with its history. Raises AdapterNotFound, AliasNotFound, PreconditionFailed."""
        raise NotImplementedError

    def roll_back(self, name: str, alias: str = "default", *, expected_etag: str | None = None) -> Alias:
        """Gives an alias its newest earlier meaning whose versions are all still there.

        What it meant last is dropped, not remembered: rolling back twice goes back two moves.

        Raises:
            AdapterNotFound, AliasNotFound, PreconditionFailed, DiskFull.
            NothingToRollBack: no earlier meaning is left.
        """
        raise NotImplementedError
