"""Memory in units, and a reader that fills it with the names of images instead of their bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.engine.request import AdapterTicket
from server.engine.step import HostImage, ImageRead


@dataclass
class Memory:
    """What lies in each unit: for K/V {offset: digest}, for an image its key."""

    units: list[Any]
    bound: dict[int, tuple[str, int]] = field(default_factory=dict)  # slot -> (key, first unit)


class SimulatedReader:
    """Reads end when `finish` is called or, with `latency` polls, by themselves."""

    def __init__(self, memory: Memory) -> None:
        self.latency = 1
        self.broken: dict[str, str] = {}  # key -> error
        self.started: list[str] = []
        self._memory = memory
        self._pending: list[tuple[AdapterTicket, int, int, list[int]]] = []
        self.host_room = 0  # bytes of the host tier
        self.host: dict[str, AdapterTicket] = {}
        self.warmed: list[str] = []
        self.num_host_hits = self.host_bytes = 0
        self._warming: list[AdapterTicket] = []

    def start(self, ticket: AdapterTicket, first_unit: int, num_units: int) -> None:
        self.started.append(ticket.key)
        for unit in range(first_unit, first_unit + num_units):
            self._memory.units[unit] = ticket.key
        self._pending.append((ticket, first_unit, num_units, [self.latency]))

    def warm(self, ticket: AdapterTicket) -> bool:
        self.warmed.append(ticket.key)
        if not self.has_host_room(ticket.num_bytes):
            return False
        self._warming.append(ticket)
        return True

    def has_host_room(self, num_bytes: int) -> bool:
        return num_bytes <= self.host_room

    def is_in_host(self, key: str) -> bool:
        return key in self.host

    def drop(self, key: str) -> bool:
        return self.host.pop(key, None) is not None

    def host_images(self) -> list[HostImage]:
        return [HostImage(key, ticket.name, ticket.num_bytes, 0.0) for key, ticket in self.host.items()]

    def poll(self) -> list[ImageRead]:
        ended = []
        for warm in self._warming:
            error = self.broken.get(warm.key)
            if error is None:
                self.host[warm.key] = warm
            ended.append(ImageRead(warm.key, None, error, is_for_host=True))
        self._warming.clear()
        for entry in list(self._pending):
            wanted, _, num_units, left = entry
            left[0] -= 1
            if left[0] <= 0:
                self._pending.remove(entry)
                error = self.broken.get(wanted.key)
                header = None if error else {"key": wanted.key, "num_units": num_units}
                ended.append(ImageRead(wanted.key, header, error))
        return ended
