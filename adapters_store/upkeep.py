"""What a store needs done from time to time: deletes what expired or is too old, frees what nobody holds.

Every process on a store may do it, at any moment, as often as it likes: `tend` costs little when there is nothing.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from adapters_store.record import AdapterVersion


class Collected(NamedTuple):
    versions: int  # deleted ones whose records and bytes are gone now
    held: int  # deleted ones that some process still holds
    freed_bytes: int
    stages: int  # uploads of processes that died


class Upkeep:
    def expire(self, now: datetime | None = None) -> list[AdapterVersion]:
        """Deletes the adapters whose `expires_at` has passed and that are not pinned; returns what went."""
        raise NotImplementedError

    def prune(self, name: str) -> list[AdapterVersion]:
        """Deletes versions beyond the newest N (`keep_versions` of the adapter, else of the store).

        A version that an alias points to, or that is pinned, stays, and does not count.
        """
        raise NotImplementedError

    def collect(self) -> Collected:
        """Removes the bytes of deleted versions that no process on any host holds, stray files, and dead uploads."""
        raise NotImplementedError

    def tend(self) -> Collected:
        """All of the above, for every adapter."""
        raise NotImplementedError
