"""Which adapters are brought to the device, and when; what is asked of them, and what is told.

    DISK --load--> LOADING --read done--> DEVICE --evicted--> HOST or DISK     FAILED --30 s or explicit load--> LOADING
                          \\--read broken--> FAILED

It knows keys and sizes; not where an adapter lies (`DeviceAdapters`), nor what an image contains (the residency), nor
how it is read and whether the host tier holds a copy (the reader).
A *pin* is one running sequence on the adapter; only unpinned adapters are evicted, those first whose loss the eviction
policy holds to be least. A *kept* adapter is one that the operator wants to stay: it is loaded whenever it is not here,
and is evicted only when otherwise nothing at all could run.
It holds records of adapters that are resident, loading or failed, never of those merely registered, and no call walks
over them except `residents`: `num_records_visited` counts, and a test holds it to the adapters in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from server.engine import policy
from server.engine.adapter_records import FailureBook, describe, describe_failure, describe_host
from server.engine.block_manager import BlockManager
from server.engine.device_adapters import DeviceAdapters
from server.engine.errors import AdapterBusy, AdapterLoadFailed, AdapterTooLarge, NoRoomForAdapter
from server.engine.kept_adapters import KeptAdapters
from server.engine.request import AdapterState, AdapterTicket, ResidentAdapter, Tier
from server.engine.step import AdapterEvent, ImageRead, ImageReader, Residency


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
        worth_of: policy.WorthOf = policy.worth_by_use,
    ) -> None:
        self.num_loads = 0
        self.num_load_failures = 0
        self.load_s: dict[str, float] = {}  # seconds of all loads by phase
        self._num_visited = 0
        self._blocks = blocks
        self.reader = reader
        self._unit_bytes = unit_bytes
        self._clock = clock
        self._max_units = blocks.num_units if max_bytes is None else min(blocks.num_units, max_bytes // unit_bytes)
        self._failures = FailureBook(clock)
        self._warming: dict[str, AdapterTicket] = {}  # on their way to the host tier
        self._kept = KeptAdapters(self._max_units, unit_bytes)
        self._device = DeviceAdapters(
            blocks,
            residency,
            self._kept,
            unit_bytes=unit_bytes,
            max_units=self._max_units,
            clock=clock,
            worth_of=worth_of,
            is_in_host=reader.is_in_host,
        )

    @property
    def num_records_visited(self) -> int:
        """Records looked at since the start; grows with the requests, not with the adapters that there are."""
        return self._num_visited + self._device.num_evicted_for_budget

    @property
    def evictions(self) -> Counter[str]:
        """By reason: "adapter", "kv", "budget", "asked", "kept"."""
        return self._device.evictions

    @property
    def num_loading(self) -> int:
        return self._device.num_loading

    @property
    def num_resident(self) -> int:
        return len(self._device.records) - self.num_loading

    @property
    def has_work(self) -> bool:
        """A read has not ended, or a change of residency is not told: call `poll` and `take_events`."""
        return bool(self.num_loading or self._warming or self._device.events)

    @property
    def num_pins(self) -> int:
        return sum(record.num_pins for record in self._device.records.values())

    def load_started(self, key: str) -> int | None:
        """The step in which the load that is going on began; None if there is none."""
        record = self._device.records.get(key)
        return record.started_tick if record is not None and record.state is AdapterState.LOADING else None

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
        record = self._device.records[ticket.key]
        if record.num_pins == 0:
            self._device.hold(record)
        record.num_pins += 1
        self._device.uses.count(ticket.key, self._blocks.tick)
        return record.slot

    def release(self, slot: int) -> None:
        """Undo one `acquire`."""
        record = self._device.slots[slot]
        assert record.num_pins > 0, "a pin is released once"
        self._num_visited += 1
        record.num_pins -= 1
        if record.num_pins == 0:
            self._device.touch(record)

    def prefetch(self, ticket: AdapterTicket) -> bool:
        """True if it is on the device (and now the youngest of the idle ones); else start its load if there is room.

        Raises:
            AdapterLoadFailed: as `acquire`.
        """
        self._num_visited += 1
        record = self._device.records.get(ticket.key)
        if record is not None:
            if record.state is AdapterState.DEVICE and record.num_pins == 0:
                self._device.touch(record)
            return record.state is AdapterState.DEVICE
        if (failure := self._failures.recent(ticket.key)) is not None:
            raise AdapterLoadFailed(f'adapter "{ticket.name}" could not be loaded: {failure.reason}')
        self._start(ticket)
        return False

    def expect(self, ticket: AdapterTicket, *, may_take_room: bool) -> None:
        """A request for it has arrived: bring it near before its turn comes, and to the device if that may cost others
        their place. What is wrong with it is told to the request itself, later.
        """
        if (
            ticket.key in self._device.records
            or ticket.key in self._warming
            or self._failures.recent(ticket.key) is not None
            or self.units_of(ticket) > self._max_units
        ):
            return
        if may_take_room:
            self._start(ticket)
        if ticket.key not in self._device.records and not self.reader.is_in_host(ticket.key):
            self._warm(ticket)

    def keep(self, tickets: Sequence[AdapterTicket]) -> None:
        """From now on exactly these are kept: loaded now or as soon as there is room, and evicted last of all.

        Raises:
            NoRoomForAdapter: together they are too large; nothing is changed.
        """
        changed = self._kept.replace(tickets, self.units_of)
        self._kept.absent = {k: t for k, t in self._kept.tickets.items() if k not in self._device.records}
        self._review(changed)
        self.load_kept()

    def load_kept(self) -> None:
        """Start the loads of kept adapters that are not here, as far as there is room."""
        for ticket in self._kept.lacking():
            if self._failures.recent(ticket.key) is None:
                self._start(ticket)

    def yield_kept(self) -> bool:
        """Nothing can run: let kept adapters go until somebody got in. False if that gives nothing."""
        here = [record for key in self._kept.tickets if (record := self._device.records.get(key)) is not None]
        if self._kept.is_yielding or not any(record.num_pins == 0 and record.slot >= 0 for record in here):
            return False
        self._kept.is_yielding = True
        self._review(self._kept.tickets)
        return True

    def resume_kept(self) -> None:
        """Somebody got in, or nobody waits any more: kept adapters stay again."""
        if self._kept.is_yielding:
            self._kept.is_yielding = False
            self._review(self._kept.tickets)

    def touch(self, key: str) -> None:
        """Count a resident adapter as used just now."""
        self._num_visited += 1
        record = self._device.records[key]
        if record.num_pins == 0:
            self._device.touch(record)

    def load(self, ticket: AdapterTicket, tier: Tier = Tier.DEVICE) -> AdapterState:
        """Explicit load: where it is, or LOADING with an event to follow. A failure in the past does not count.

        Raises:
            AdapterTooLarge: never possible.
            NoRoomForAdapter: not possible now.
        """
        self._failures.forget(ticket.key)
        if tier is Tier.HOST:
            return self._load_to_host(ticket)
        self.check_size(ticket)
        if self.prefetch(ticket):
            return AdapterState.DEVICE
        if ticket.key not in self._device.records:
            raise NoRoomForAdapter(
                f'adapter "{ticket.name}" needs {self.units_of(ticket)} contiguous units, and running requests and '
                "their adapters leave no such room now. Load it later, or evict another adapter."
            )
        return AdapterState.LOADING

    def evict(self, key: str, tier: Tier = Tier.DEVICE) -> bool:
        """Take it off the device, or out of the host tier; False if it is not there.

        Raises:
            AdapterBusy: running sequences use it, it is being loaded, or it is kept. It is not named there, since
                others may know it by other names.
        """
        if tier is Tier.HOST:
            return self.reader.drop(key)
        record = self._device.records.get(key)
        if record is None:
            return False
        if record.state is AdapterState.LOADING:
            raise AdapterBusy("it is being loaded; evict it when that has ended")
        if record.num_pins:
            raise AdapterBusy(f"it is used by {record.num_pins} running requests")
        if key in self._kept.tickets:
            raise AdapterBusy("it is pinned; unpin it first")
        self._device.evict(record, "asked")
        return True

    def poll(self) -> None:
        """Take over the reads that ended: bind the good ones to slots, remember why the others failed."""
        self.load_kept()
        if not self.num_loading and not self._warming:
            return
        for read in self.reader.poll():
            self._num_visited += 1
            if read.is_for_host:
                self._end_warming(read)
                continue
            self._end_load(read)

    def take_events(self) -> list[AdapterEvent]:
        """Changes of residency since the last call."""
        events, self._device.events = self._device.events, []
        return events

    def residents(self, *, with_past: bool = False) -> list[ResidentAdapter]:
        """All that are resident, loading, in the host tier or failed, and with the past those that were; walks over the
        records, so not for the step loop.
        """
        now_s, tick = self._clock(), self._blocks.tick
        found: dict[str, ResidentAdapter] = {}
        for key, record in self._device.records.items():
            is_kept, in_host = key in self._kept.tickets, self.reader.is_in_host(key)
            found[key] = describe(record, now_s, self._device.uses.at(key, tick), is_kept=is_kept, in_host=in_host)
        for image in self.reader.host_images():
            found.setdefault(image.key, describe_host(image, now_s, is_kept=image.key in self._kept.tickets))
        for failure in self._failures.all():
            found.setdefault(failure.ticket.key, describe_failure(failure, now_s))
        if with_past:
            for past in self._device.uses.past(now_s):
                found.setdefault(past.key, past)
        return list(found.values())

    def check_integrity(self, pins_by_key: dict[str, int]) -> None:
        """Compare the books with each other, with the pool and with the running sequences' pins; see DeviceAdapters."""
        self._device.check_integrity(pins_by_key)

    def _start(self, ticket: AdapterTicket) -> None:
        record = self._device.place(ticket, self.units_of(ticket))
        if record is None:
            return
        self._failures.forget(ticket.key)
        self.num_loads += 1
        self.reader.start(ticket, record.first_unit, record.num_units)

    def _end_load(self, read: ImageRead) -> None:
        record = self._device.records[read.key]
        started_s = self._clock()
        error = read.error or "the reader gave no reason"
        if read.header is not None:
            error = self._device.bind(record, read.header) or ""
        record.load_s = {**read.phases_s, "bind": self._clock() - started_s}
        self._count_phases(record.load_s)
        if error:
            self._device.give_up(record, error)
            self._remember_failure(record.ticket, error)

    def _count_phases(self, phases_s: dict[str, float]) -> None:
        for phase, seconds in phases_s.items():
            self.load_s[phase] = self.load_s.get(phase, 0.0) + seconds

    def _load_to_host(self, ticket: AdapterTicket) -> AdapterState:
        if not self.reader.has_host_room(ticket.num_bytes):
            raise NoRoomForAdapter(
                f'adapter "{ticket.name}" takes {ticket.num_bytes} bytes, more than the host tier of this server may '
                "hold. Load it to the device, or start with a larger --host-adapter-memory."
            )
        if self.reader.is_in_host(ticket.key):
            return AdapterState.HOST
        self._warm(ticket)
        return AdapterState.LOADING

    def _warm(self, ticket: AdapterTicket) -> None:
        if ticket.key not in self._warming and self.reader.warm(ticket):
            self._warming[ticket.key] = ticket

    def _end_warming(self, read: ImageRead) -> None:
        ticket = self._warming.pop(read.key)
        self._count_phases(read.phases_s)
        if read.error is None:
            self._device.events.append(AdapterEvent(ticket.key, ticket.name, AdapterState.HOST.value, ""))
        else:
            self._remember_failure(ticket, read.error)

    def _review(self, keys: Iterable[str]) -> None:
        """Whether these are kept may have changed: evictable or not, where nobody runs on them."""
        for key in keys:
            record = self._device.records.get(key)
            if record is not None and record.state is AdapterState.DEVICE and record.num_pins == 0:
                self._device.touch(record)

    def _remember_failure(self, ticket: AdapterTicket, reason: str) -> None:
        self.num_load_failures += 1
        self._failures.remember(ticket, reason)
        self._device.events.append(AdapterEvent(ticket.key, ticket.name, AdapterState.FAILED.value, reason))
