"""What the engine remembers of adapters: those that are resident or loading, those that failed, those that were here.

It holds no pool and decides nothing. Memory of the past is bounded: the uses of `MAX_REMEMBERED` adapters, the
failures of `MAX_FAILURES`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from server.engine.request import AdapterState, AdapterTicket, ResidentAdapter
from server.engine.step import HostImage

MAX_REMEMBERED = 4096
MAX_FAILURES = 1024
RETRY_FAILED_AFTER_S = 30.0
_HALF_LIFE_STEPS = 4096  # after so many steps a use counts half

NO_SLOT = -1


@dataclass(slots=True)
class AdapterRecord:
    """An adapter that has units of the pool."""

    ticket: AdapterTicket
    state: AdapterState  # LOADING or DEVICE
    first_unit: int
    num_units: int
    last_used_s: float
    started_tick: int  # step in which its load began
    slot: int = NO_SLOT  # given with DEVICE
    num_pins: int = 0
    load_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    ticket: AdapterTicket
    reason: str
    since_s: float


class FailureBook:
    """The last loads that failed, by key: what failed a moment ago is not tried again at once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: dict[str, Failure] = {}  # oldest first

    def recent(self, key: str) -> Failure | None:
        """The failure of less than `RETRY_FAILED_AFTER_S` ago."""
        failure = self._failures.get(key)
        is_recent = failure is not None and self._clock() - failure.since_s < RETRY_FAILED_AFTER_S
        return failure if is_recent else None

    def remember(self, ticket: AdapterTicket, reason: str) -> None:
        self._failures[ticket.key] = Failure(ticket, reason, self._clock())
        if len(self._failures) > MAX_FAILURES:
            del self._failures[next(iter(self._failures))]

    def forget(self, key: str) -> None:
        self._failures.pop(key, None)

    def all(self) -> list[Failure]:
        return list(self._failures.values())


@dataclass(frozen=True, slots=True)
class _Past:
    """An adapter that was here once."""

    ticket: AdapterTicket
    uses: float
    tick: int
    last_used_s: float
    reason: str  # why it left


class UseBook:
    """How often each adapter was used, over its evictions; a use counts less the longer ago it was."""

    def __init__(self) -> None:
        self._uses: dict[str, tuple[float, int]] = {}  # of those that have units: (count, tick of the last)
        self._gone: OrderedDict[str, _Past] = OrderedDict()  # oldest first

    def arrive(self, key: str) -> None:
        past = self._gone.pop(key, None)
        self._uses[key] = (0.0, 0) if past is None else (past.uses, past.tick)

    def count(self, key: str, tick: int) -> None:
        """One more use."""
        self._uses[key] = (self.at(key, tick) + 1.0, tick)

    def at(self, key: str, tick: int) -> float:
        uses, last = self._uses[key]
        return float(uses * 0.5 ** ((tick - last) / _HALF_LIFE_STEPS))

    def leave(self, record: AdapterRecord, reason: str) -> None:
        key = record.ticket.key
        self._gone[key] = _Past(record.ticket, *self._uses.pop(key), record.last_used_s, reason)
        if len(self._gone) > MAX_REMEMBERED:
            self._gone.popitem(last=False)

    def past(self, now_s: float) -> Iterable[ResidentAdapter]:
        """Everyone who was here and has gone, as on disk."""
        for key, past in self._gone.items():
            yield ResidentAdapter(
                key,
                past.ticket.name,
                AdapterState.DISK,
                past.ticket.num_bytes,
                num_units=0,
                num_pins=0,
                last_used_s=past.last_used_s,
                reason=past.reason,
                idle_s=now_s - past.last_used_s,
                num_uses=past.uses,
            )


def describe(record: AdapterRecord, now_s: float, uses: float, *, is_kept: bool, in_host: bool) -> ResidentAdapter:
    return ResidentAdapter(
        record.ticket.key,
        record.ticket.name,
        record.state,
        record.ticket.num_bytes,
        record.num_units,
        record.num_pins,
        record.last_used_s,
        is_kept=is_kept,
        in_host=in_host,
        idle_s=0.0 if record.num_pins else now_s - record.last_used_s,
        num_uses=uses,
        load_s=record.load_s,
    )


def describe_failure(failure: Failure, now_s: float) -> ResidentAdapter:
    ticket, since_s = failure.ticket, failure.since_s
    return ResidentAdapter(
        ticket.key,
        ticket.name,
        AdapterState.FAILED,
        ticket.num_bytes,
        num_units=0,
        num_pins=0,
        last_used_s=since_s,
        reason=failure.reason,
        idle_s=now_s - since_s,
    )


def describe_host(image: HostImage, now_s: float, *, is_kept: bool) -> ResidentAdapter:
    return ResidentAdapter(
        image.key,
        image.name,
        AdapterState.HOST,
        image.num_bytes,
        num_units=0,
        num_pins=0,
        last_used_s=image.last_used_s,
        is_kept=is_kept,
        in_host=True,
        idle_s=now_s - image.last_used_s,
    )
