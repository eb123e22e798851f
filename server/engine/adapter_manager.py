"""Which adapters are on the device, which slot each has, and who goes when there is no room.

    DISK --load--> LOADING --read done--> DEVICE --evicted--> DISK          FAILED --30 s or explicit load--> LOADING
                          \\--read broken--> FAILED

It knows keys, units and slots; not what an image contains (the residency does) nor how it is read (the reader does).
A *pin* is one running sequence on the adapter; only unpinned adapters are evicted, least recently used first.
It holds records of adapters that are resident, loading or failed, never of those merely registered, and no call walks
over them except `residents`: `num_records_visited` counts, and a test holds it to the adapters in use.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.block_manager import BlockManager
from server.engine.errors import AdapterBusy, AdapterLoadFailed, AdapterTooLarge, NoRoomForAdapter
from server.engine.request import AdapterState, AdapterTicket, ResidentAdapter
from server.engine.step import AdapterEvent, ImageRead, ImageReader, Residency

RETRY_FAILED_AFTER_S = 30.0
_MAX_FAILURES_KEPT = 1024

_NO_SLOT = -1


@dataclass(slots=True)
class _Record:
    ticket: AdapterTicket
    state: AdapterState  # LOADING or DEVICE
    first_unit: int
    num_units: int
    last_used_s: float
    slot: int = _NO_SLOT  # given with DEVICE
    num_pins: int = 0


@dataclass(frozen=True, slots=True)
class _Failure:
    ticket: AdapterTicket
    reason: str
    since_s: float


class AdapterManager:
    """Residency of adapters in the pool, under the pool's room and an optional budget of bytes."""

    def __init__(
        self,
        blocks: BlockManager,
        reader: ImageReader,
        residency: Residency,
        *,
        unit_bytes: int,
        clock: Callable[[], float],
        max_bytes: int | None = None,
    ) -> None:
        self.num_records_visited = 0
        self.num_loads = 0
        self.num_load_failures = 0
        self.evictions: Counter[str] = Counter()  # by reason: "adapter", "kv", "budget", "asked"
        self.num_loading = 0
        self._blocks = blocks
        self._reader = reader
        self._residency = residency
        self._unit_bytes = unit_bytes
        self._clock = clock
        self._max_units = blocks.num_units if max_bytes is None else min(blocks.num_units, max_bytes // unit_bytes)
        self._num_units = 0
        self._records: dict[str, _Record] = {}
        self._failures: dict[str, _Failure] = {}
        self._idle: OrderedDict[str, _Record] = OrderedDict()  # least recently used first
        self._by_slot: list[_Record | None] = []
        self._free_slots: list[int] = []  # a heap
        self._events: list[AdapterEvent] = []
        blocks.on_run_evicted = self._on_run_evicted
        self._by_first_unit: dict[int, _Record] = {}

    @property
    def num_resident(self) -> int:
        return len(self._records) - self.num_loading

    @property
    def num_pins(self) -> int:
        return sum(record.num_pins for record in self._records.values())

    def is_loading(self, key: str) -> bool:
        record = self._records.get(key)
        return record is not None and record.state is AdapterState.LOADING

    def units_of(self, ticket: AdapterTicket) -> int:
        """Units that the image takes, at least one."""
        return max(1, -(-ticket.num_bytes // self._unit_bytes))

    def check_size(self, ticket: AdapterTicket) -> None:
        """Refuse what could not be resident even alone.

        Raises:
            AdapterTooLarge: with both sizes.
        """
        if self.units_of(ticket) <= self._max_units:
            return
        room_bytes = self._max_units * self._unit_bytes
        raise AdapterTooLarge(
            f'adapter "{ticket.name}" takes {ticket.num_bytes} bytes on the device, and at most {room_bytes} can be '
            "given to adapters. Start with a larger pool, or train an adapter of a smaller rank."
        )

    def acquire(self, ticket: AdapterTicket) -> int | None:
        """Pin the adapter and return its slot; None means "not now": it is being loaded, or there is no room yet.

        Raises:
            AdapterLoadFailed: its last load failed less than `RETRY_FAILED_AFTER_S` ago.
        """
        if not self.prefetch(ticket):
            return None
        record = self._records[ticket.key]
        if record.num_pins == 0:
            del self._idle[ticket.key]
            self._blocks.pin_run(record.first_unit)
        record.num_pins += 1
        return record.slot

    def release(self, slot: int) -> None:
        """Undo one `acquire`."""
        record = self._by_slot[slot]
        assert record is not None, "released slots are bound"
        assert record.num_pins > 0, "a pin is released once"
        self.num_records_visited += 1
        record.num_pins -= 1
        if record.num_pins == 0:
            self._touch(record)

    def prefetch(self, ticket: AdapterTicket) -> bool:
        """True if it is on the device (and now the youngest of the idle ones); else start its load if there is room.

        Raises:
            AdapterLoadFailed: as `acquire`.
        """
        self.num_records_visited += 1
        record = self._records.get(ticket.key)
        if record is not None:
            if record.state is AdapterState.DEVICE and record.num_pins == 0:
                self._touch(record)
            return record.state is AdapterState.DEVICE
        failure = self._failures.get(ticket.key)
        if failure is not None and self._clock() - failure.since_s < RETRY_FAILED_AFTER_S:
            raise AdapterLoadFailed(f'adapter "{ticket.name}" could not be loaded: {failure.reason}')
        self._start(ticket)
        return False

    def touch(self, key: str) -> None:
        """Count a resident adapter as used just now."""
        self.num_records_visited += 1
        record = self._records[key]
        if record.num_pins == 0:
            self._touch(record)

    def load(self, ticket: AdapterTicket) -> AdapterState:
        """Explicit load: DEVICE, or LOADING with an event to follow. A failure in the past does not count.

        Raises:
            AdapterTooLarge: never possible.
            NoRoomForAdapter: not possible now.
        """
        self.check_size(ticket)
        self._failures.pop(ticket.key, None)
        if self.prefetch(ticket):
            return AdapterState.DEVICE
        if ticket.key not in self._records:
            raise NoRoomForAdapter(
                f'adapter "{ticket.name}" needs {self.units_of(ticket)} contiguous units, and running requests and '
                "their adapters leave no such room now. Load it later, or evict another adapter."
            )
        return AdapterState.LOADING

    def evict(self, key: str) -> bool:
        """Take it off the device; False if it is not there.

        Raises:
            AdapterBusy: running sequences use it, or it is being loaded.
        """
        record = self._records.get(key)
        if record is None:
            return False
        if record.state is AdapterState.LOADING:
            raise AdapterBusy(f'adapter "{record.ticket.name}" is being loaded; evict it when that has ended')
        if record.num_pins:
            raise AdapterBusy(f'adapter "{record.ticket.name}" is used by {record.num_pins} running requests')
        self._evict(record, "asked")
        return True

    def poll(self) -> None:
        """Take over the reads that ended: bind the good ones to slots, remember why the others failed."""
        if not self.num_loading:
            return
        for read in self._reader.poll():
            self.num_records_visited += 1
            self.num_loading -= 1
            record = self._records[read.key]
            error = self._bind(record, read)
            if error is not None:
                self._fail(record, error)

    def take_events(self) -> list[AdapterEvent]:
        """Changes of residency since the last call."""
        events, self._events = self._events, []
        return events

    def residents(self) -> list[ResidentAdapter]:
        """All that are resident, loading or failed; walks over the records, so not for the step loop."""
        here = [_describe(record) for record in self._records.values()]
        failed = [
            ResidentAdapter(key, f.ticket.name, AdapterState.FAILED, f.ticket.num_bytes, 0, 0, f.since_s, f.reason)
            for key, f in self._failures.items()
            if key not in self._records
        ]
        return here + failed

    def check_integrity(self, pins_by_key: dict[str, int]) -> None:
        """Compare records with the pool and with the running sequences' pins.

        Raises:
            AssertionError: our bookkeeping is wrong.
        """
        pins = {key: record.num_pins for key, record in self._records.items() if record.num_pins}
        _require(pins == pins_by_key, f"pins are {pins}, running sequences hold {pins_by_key}")
        runs = {record.first_unit: record.num_units for record in self._records.values()}
        _require(runs == {run.first: run.num_units for run in self._blocks.runs.values()}, "runs without an adapter")
        _require(self._num_units == sum(runs.values()), "units of adapters are miscounted")
        idle = {k for k, r in self._records.items() if r.state is AdapterState.DEVICE and not r.num_pins}
        _require(set(self._idle) == idle, "the list of idle adapters is wrong")
        bound = {r.ticket.key: r.slot for r in self._by_slot if r is not None}
        device = {k: r.slot for k, r in self._records.items() if r.state is AdapterState.DEVICE}
        _require(bound == device, "slots and resident adapters differ")
        _require(self.num_loading == len(self._records) - len(device), "loads are miscounted")

    def _start(self, ticket: AdapterTicket) -> None:
        num_units = self.units_of(ticket)
        if not self._make_room_in_budget(num_units):
            return
        first_unit = self._blocks.take_run(num_units)
        if first_unit is None:
            return
        record = _Record(ticket, AdapterState.LOADING, first_unit, num_units, self._clock())
        self._failures.pop(ticket.key, None)
        self._records[ticket.key] = record
        self._by_first_unit[first_unit] = record
        self._num_units += num_units
        self.num_loading += 1
        self.num_loads += 1
        self._reader.start(ticket, first_unit, num_units)

    def _make_room_in_budget(self, num_units: int) -> bool:
        if self._max_units == self._blocks.num_units:
            return True  # no budget but the pool, which chooses by place as well as by age
        while self._num_units + num_units > self._max_units:
            oldest = next(iter(self._idle.values()), None)
            if oldest is None or self._blocks.runs[oldest.first_unit].last_used == self._blocks.tick:
                return False
            self.num_records_visited += 1
            self._evict(oldest, "budget")
        return True

    def _bind(self, record: _Record, read: ImageRead) -> str | None:
        """None, or why the image cannot serve."""
        if read.header is None:
            return read.error or "the reader gave no reason"
        slot = heapq.heappop(self._free_slots) if self._free_slots else len(self._by_slot)
        try:
            self._residency.bind(slot, read.header, record.first_unit * self._unit_bytes)
        except Exception as error:  # a broken image fails its own requests, whatever it is that breaks
            if slot < len(self._by_slot):
                heapq.heappush(self._free_slots, slot)
            return f"{type(error).__name__}: {error}"
        if slot == len(self._by_slot):
            self._by_slot.append(None)
        self._by_slot[slot] = record
        record.slot = slot
        record.state = AdapterState.DEVICE
        self._touch(record)
        self._tell(record, AdapterState.DEVICE, "")
        return None

    def _fail(self, record: _Record, reason: str) -> None:
        self.num_load_failures += 1
        self._forget(record)
        self._blocks.free_run(record.first_unit)
        self._failures[record.ticket.key] = _Failure(record.ticket, reason, self._clock())
        if len(self._failures) > _MAX_FAILURES_KEPT:
            del self._failures[next(iter(self._failures))]
        self._tell(record, AdapterState.FAILED, reason)

    def _evict(self, record: _Record, reason: str) -> None:
        self._on_run_evicted(record.first_unit, reason)
        self._blocks.free_run(record.first_unit)

    def _on_run_evicted(self, first_unit: int, reason: str) -> None:
        """The pool takes the run back: unbind the slot before its units are used again."""
        record = self._by_first_unit[first_unit]
        assert record.num_pins == 0, "only unpinned adapters are evicted"
        self._forget(record)
        del self._idle[record.ticket.key]
        self._residency.free(record.slot)
        self._by_slot[record.slot] = None
        heapq.heappush(self._free_slots, record.slot)
        self.evictions[reason] += 1
        self._tell(record, AdapterState.DISK, reason)

    def _forget(self, record: _Record) -> None:
        del self._records[record.ticket.key]
        del self._by_first_unit[record.first_unit]
        self._num_units -= record.num_units

    def _touch(self, record: _Record) -> None:
        record.last_used_s = self._clock()
        self._idle[record.ticket.key] = record
        self._idle.move_to_end(record.ticket.key)
        self._blocks.idle_run(record.first_unit)

    def _tell(self, record: _Record, state: AdapterState, reason: str) -> None:
        self._events.append(AdapterEvent(record.ticket.key, record.ticket.name, state.value, reason))


def _describe(record: _Record) -> ResidentAdapter:
    ticket = record.ticket
    size_bytes, units = ticket.num_bytes, record.num_units
    return ResidentAdapter(
        ticket.key, ticket.name, record.state, size_bytes, units, record.num_pins, record.last_used_s
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"adapters: {message}")
