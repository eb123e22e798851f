"""The adapters that the operator wants to stay on the device, and when they may go all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.engine.errors import NoRoomForAdapter
from server.engine.request import AdapterTicket

KEPT_SHARE = 0.5  # of the room for adapters; the rest stays for whoever comes


class KeptAdapters:
    """Tickets by key. While `is_yielding` they are evictable like others, and are not loaded."""

    def __init__(self, max_units: int, unit_bytes: int) -> None:
        self.tickets: dict[str, AdapterTicket] = {}
        self.absent: dict[str, AdapterTicket] = {}  # those without units of the pool: what a step has to look at
        self.is_yielding = False
        self._room_units = int(max_units * KEPT_SHARE)
        self._unit_bytes = unit_bytes

    def lacking(self) -> list[AdapterTicket]:
        """Those to be loaded as soon as there is room."""
        return [] if self.is_yielding else list(self.absent.values())

    def holds(self, key: str) -> bool:
        """Whether it must not be evicted now."""
        return not self.is_yielding and key in self.tickets

    def replace(self, tickets: Sequence[AdapterTicket], units_of: Callable[[AdapterTicket], int]) -> set[str]:
        """From now on exactly these; the keys for which that is a change.

        Raises:
            NoRoomForAdapter: together they are more than `KEPT_SHARE` of the room; nothing is changed.
        """
        units = sum(map(units_of, tickets))
        if units > self._room_units:
            raise NoRoomForAdapter(
                f"the pinned adapters would take {units * self._unit_bytes} bytes of the device, and at most "
                f"{self._room_units * self._unit_bytes} can be pinned. Unpin others, or start with a larger pool."
            )
        before = self.tickets.keys()
        self.tickets = {ticket.key: ticket for ticket in tickets}
        return before ^ self.tickets.keys()
