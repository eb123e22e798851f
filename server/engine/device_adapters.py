"""The adapters that have units of the pool: their place, their slot, and who goes when there is no room.

    place -> LOADING -> bind -> DEVICE, idle or held -> evict
                     -> give_up

It is told what to do and keeps the books of it; what is asked for, and when, is the manager's business.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from server.engine import policy
from server.engine.adapter_checks import require_agreement
from server.engine.adapter_records import AdapterRecord, UseBook
from server.engine.adapter_slots import AdapterSlots
from server.engine.block_manager import BlockManager
from server.engine.kept_adapters import KeptAdapters
from server.engine.request import AdapterState, AdapterTicket
from server.engine.step import AdapterEvent, Residency

_WHY = {
    "adapter": "another adapter took its place",
    "kv": "running requests took its place",
    "budget": "the adapters' budget of bytes was used up",
    "asked": "somebody asked for it",
    "kept": "it was pinned, and without its room nothing could run",
}


class DeviceAdapters:
    """Records by key. `records` and `slots` may be read by whoever holds it, and are changed here only."""

    def __init__(
        self,
        blocks: BlockManager,
        residency: Residency,
        kept: KeptAdapters,
        *,
        unit_bytes: int,
        max_units: int,
        clock: Callable[[], float],
        worth_of: policy.WorthOf,
        is_in_host: Callable[[str], bool],
    ) -> None:
        self.records: dict[str, AdapterRecord] = {}
        self.slots = AdapterSlots()
        self.uses = UseBook()
        self.num_loading = 0
        self.num_evicted_for_budget = 0
        self.evictions: Counter[str] = Counter()  # by reason, see `_WHY`
        self.events: list[AdapterEvent] = []
        self._blocks = blocks
        self._residency = residency
        self._kept = kept
        self._unit_bytes = unit_bytes
        self._max_units = max_units
        self._clock = clock
        self._worth_of = worth_of
        self._is_in_host = is_in_host
        self._num_units = 0
        self._idle: OrderedDict[str, AdapterRecord] = OrderedDict()  # evictable, least recently used first
        self._by_first_unit: dict[int, AdapterRecord] = {}
        blocks.on_run_evicted = self._on_run_evicted

    def place(self, ticket: AdapterTicket, num_units: int) -> AdapterRecord | None:
        """Units for an adapter that is to be loaded, others evicted as needed; None if there is no room now."""
        if not self._make_room_in_budget(num_units):
            return None
        first_unit = self._blocks.take_run(num_units)
        if first_unit is None:
            return None
        tick = self._blocks.tick
        record = AdapterRecord(ticket, AdapterState.LOADING, first_unit, num_units, self._clock(), tick)
        self.records[ticket.key] = record
        self._kept.absent.pop(ticket.key, None)
        self.uses.arrive(ticket.key)
        self._by_first_unit[first_unit] = record
        self._num_units += num_units
        self.num_loading += 1
        return record

    def bind(self, record: AdapterRecord, header: Mapping[str, Any]) -> str | None:
        """Its image is there: from now on rows may use it. None, or why it cannot serve (then `give_up` follows)."""
        try:
            self._residency.bind(self.slots.next_free, dict(header), record.first_unit * self._unit_bytes)
        except Exception as error:  # a broken image fails its own requests, whatever it is that breaks
            return f"{type(error).__name__}: {error}"
        self.num_loading -= 1
        self.slots.take(record)
        record.state = AdapterState.DEVICE
        self.touch(record)
        self._tell(record, AdapterState.DEVICE, "")
        return None

    def give_up(self, record: AdapterRecord, reason: str) -> None:
        """Its load failed."""
        self.num_loading -= 1
        self._forget(record, reason)
        self._blocks.free_run(record.first_unit)

    def evict(self, record: AdapterRecord, reason: str) -> None:
        self._on_run_evicted(record.first_unit, reason)
        self._blocks.free_run(record.first_unit)

    def touch(self, record: AdapterRecord) -> None:
        """Nobody runs on it, and it is the youngest of those."""
        record.last_used_s = self._clock()
        key = record.ticket.key
        if self._kept.holds(key):
            self.hold(record)
            return
        uses = self.uses.at(key, self._blocks.tick)
        worth = self._worth_of(record.num_units, uses, is_near=self._is_in_host(key))
        self._idle[key] = record
        self._idle.move_to_end(key)
        self._blocks.idle_run(record.first_unit, worth)

    def hold(self, record: AdapterRecord) -> None:
        """It cannot be evicted."""
        self._idle.pop(record.ticket.key, None)
        self._blocks.pin_run(record.first_unit)

    def check_integrity(self, pins_by_key: dict[str, int]) -> None:
        """Compare records with the pool and with the running sequences' pins.

        Raises:
            AssertionError: our bookkeeping is wrong.
        """
        kept = {key for key in self.records if self._kept.holds(key)}
        require_agreement(self.records, self._blocks, self.slots, set(self._idle), pins_by_key, kept)
        counted = (sum(r.num_units for r in self.records.values()), len(self.records) - len(self.slots.by_key()))
        assert counted == (self._num_units, self.num_loading), "adapters: units or loads are miscounted"
        absent = self._kept.tickets.keys() - self.records.keys()
        assert self._kept.absent.keys() == absent, "adapters: the list of absent kept ones is wrong"

    def _make_room_in_budget(self, num_units: int) -> bool:
        if self._max_units == self._blocks.num_units:
            return True  # no budget but the pool, which chooses by place as well as by worth
        while self._num_units + num_units > self._max_units:
            cheapest = self._blocks.cheapest_idle_run()
            if cheapest is None or self._blocks.runs[cheapest].last_used == self._blocks.tick:
                return False
            self.num_evicted_for_budget += 1
            self.evict(self._by_first_unit[cheapest], "budget")
        return True

    def _on_run_evicted(self, first_unit: int, reason: str) -> None:
        """The pool takes the run back: unbind the slot before its units are used again."""
        record = self._by_first_unit[first_unit]
        assert record.num_pins == 0, "only unpinned adapters are evicted"
        key = record.ticket.key
        if key in self._kept.tickets:
            reason = "kept"
        self._forget(record, f"evicted: {_WHY[reason]}")
        self._idle.pop(key, None)
        self._residency.free(record.slot)
        self.slots.give_back(record)
        self.evictions[reason] += 1
        self._tell(record, AdapterState.HOST if self._is_in_host(key) else AdapterState.DISK, reason)

    def _forget(self, record: AdapterRecord, reason: str) -> None:
        key = record.ticket.key
        del self.records[key]
        if key in self._kept.tickets:
            self._kept.absent[key] = record.ticket
        del self._by_first_unit[record.first_unit]
        self.uses.leave(record, reason)
        self._num_units -= record.num_units

    def _tell(self, record: AdapterRecord, state: AdapterState, reason: str) -> None:
        self.events.append(AdapterEvent(record.ticket.key, record.ticket.name, state.value, reason))
