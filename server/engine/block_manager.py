"""Who owns each unit of the device's pool. It knows unit numbers, hashes and runs; no bytes, tensors or adapters.

A unit holds one K/V block. K/V takes units from the low end, adapters take contiguous runs from the high end, and
what nobody uses just now (blocks kept for prefix hits, idle runs) lies in one LRU list from which either side takes.
The list says whether blocks or adapters are next; which adapter goes is weighed: least worth a unit, by its age.

    0 1 2 3 4 5 6 7 8 9            K in use (refs > 0)   C cached (refs == 0, has a hash)
    K K C K . . C A A I            A pinned run          I idle run                        . free

Invariant: free + in use + cached + units of runs == all.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.engine import policy
from server.engine.sequence import Int32Array, Int64Array

FREE, KV, RUN = 0, 1, 2  # owners of a unit

_NUM_COMPARED = 16  # idle runs of which the one with the least loss is evicted
_LOSS_SCALE = 1 << 20  # loss of evicting what was used in this very step; it halves with each doubling of age


@dataclass(slots=True)
class Run:
    """Contiguous units of one adapter."""

    first: int
    num_units: int
    is_idle: bool  # evictable, and in the LRU list under its first unit
    last_used: int  # tick
    worth: float = 0.0  # units that it would cost to bring it back, weighed by how often it is used

    @property
    def end(self) -> int:
        return self.first + self.num_units


class BlockManager:
    """The pool. `tick` is the number of the current step and must be advanced by the scheduler."""

    def __init__(self, num_units: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_units = num_units
        self.tick = 0
        self.num_kv_evictions = 0
        self.on_run_evicted: Callable[[int, str], None] = _nobody_listens  # (first unit, reason), before it is freed
        self.owner: npt.NDArray[np.int8] = np.zeros(num_units, np.int8)
        self.refs: Int32Array = np.zeros(num_units, np.int32)  # sequences that use the block
        self.last_used: Int64Array = np.zeros(num_units, np.int64)  # tick of the last release, for cached blocks
        self.runs: dict[int, Run] = {}  # by first unit
        self.num_free = num_units
        self.num_cached = 0
        self.num_idle_run_units = 0
        self._caching = enable_prefix_caching
        self._hash_of: list[bytes | None] = [None] * num_units
        self._by_hash: dict[bytes, int] = {}
        self._lru: OrderedDict[int, None] = OrderedDict()  # cached blocks and first units of idle runs, oldest first
        self._idle_runs: OrderedDict[int, Run] = OrderedDict()  # the runs of that list alone, oldest first
        # Every free unit is in the heap exactly once; units that became part of a run meanwhile are stale entries.
        self._free_heap = list(range(num_units))
        self._in_heap = bytearray(b"\x01" * num_units)
        self._changes = 0  # grows whenever room may have appeared
        self._hopeless_run: tuple[int, int, int] | None = None  # (num_units, changes, tick) of a vain search

    @property
    def num_available(self) -> int:
        """Units that `allocate` could give now, evicting everything evictable."""
        return self.num_free + self.num_cached + self.num_idle_run_units

    @property
    def num_used(self) -> int:
        """K/V units that running sequences use."""
        return self.num_units - self.num_free - self.num_cached - self.num_run_units

    @property
    def num_run_units(self) -> int:
        return sum(run.num_units for run in self.runs.values())

    # K/V blocks

    def allocate(self, count: int) -> Int32Array | None:
        """The lowest `count` units, evicting the oldest idle things as needed; None, and no change, if impossible."""
        if count > self.num_available:
            return None
        while self.num_free < count:
            self._evict_oldest()
        units = np.fromiter((self._pop_free() for _ in range(count)), np.int32, count)
        self.owner[units] = KV
        self.refs[units] = 1
        self.num_free -= count
        return units

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Units that hold the longest known prefix of these blocks. Changes nothing: `share` them to keep them."""
        units: list[int] = []
        for block_hash in hashes:
            unit = self._by_hash.get(block_hash)
            if unit is None:
                break
            units.append(unit)
        return units

    def share(self, units: Iterable[int]) -> None:
        """One more sequence uses these blocks."""
        for unit in units:
            if self.refs[unit] == 0:
                del self._lru[unit]
                self.num_cached -= 1
            self.refs[unit] += 1

    def register(self, unit: int, block_hash: bytes) -> None:
        """The block is full and computed: others may find it. The first block of a hash stays the known one."""
        if self._caching and self._hash_of[unit] is None and block_hash not in self._by_hash:
            self._hash_of[unit] = block_hash
            self._by_hash[block_hash] = unit

    def discard(self, units: Iterable[int]) -> None:
        """Nobody may find these blocks any more (their contents are doubtful); users keep them."""
        for unit in units:
            self._forget_hash(unit)
            if self.owner[unit] == KV and self.refs[unit] == 0:
                del self._lru[unit]
                self.num_cached -= 1
                self._give_back(unit)

    def release(self, units: Int32Array) -> None:
        """One sequence less uses these blocks (in its order): the registered ones stay cached, the others are free."""
        self.refs[units] -= 1
        # From the end: of one chain the tail is evicted first, since without its head it is of no use.
        for unit in reversed(units.tolist()):
            if self.refs[unit] > 0:
                continue
            if self._hash_of[unit] is None:
                self._give_back(unit)
            else:
                self.last_used[unit] = self.tick
                self._lru[unit] = None
                self.num_cached += 1
        self._changes += 1

    # runs of adapters

    def take_run(self, count: int) -> int | None:
        """First unit of `count` contiguous units, evicting what lies there; None, and no change, if impossible now.

        Of all places without blocks in use, pinned runs and runs touched in this tick, the one with the least loss is
        taken (units lost, weighed by the inverse of their age), and of equal ones the highest. The run starts pinned.
        """
        if self._is_hopeless(count):
            return None
        first = self._cheapest_place(count)
        if first is None:
            self._hopeless_run = (count, self._changes, self.tick)
            return None
        self._clear(first, first + count)
        self.owner[first : first + count] = RUN
        self.num_free -= count
        self.runs[first] = Run(first, count, is_idle=False, last_used=self.tick)
        return first

    def pin_run(self, first: int) -> None:
        """The run is in use: it cannot be evicted."""
        run = self.runs[first]
        if run.is_idle:
            run.is_idle = False
            del self._lru[first], self._idle_runs[first]
            self.num_idle_run_units -= run.num_units

    def idle_run(self, first: int, worth: float | None = None) -> None:
        """Nobody uses the run just now: it may be evicted, the youngest of all. `worth`: by default its size."""
        run = self.runs[first]
        run.last_used = self.tick
        run.worth = float(run.num_units) if worth is None else worth
        if not run.is_idle:
            run.is_idle = True
            self._lru[first] = None
            self._idle_runs[first] = run
            self.num_idle_run_units += run.num_units
            self._changes += 1
        self._lru.move_to_end(first)
        self._idle_runs.move_to_end(first)

    def cheapest_idle_run(self) -> int | None:
        """First unit of the idle run with the least loss a unit, among those that were used longest ago. One that was
        used in this tick comes after all others: somebody is about to run on it.
        """
        oldest = itertools.islice(self._idle_runs.values(), _NUM_COMPARED)
        best = min(oldest, key=lambda run: (run.last_used == self.tick, self._loss(run) / run.num_units), default=None)
        return None if best is None else best.first

    def free_run(self, first: int) -> None:
        """Give the run's units back; whoever calls knows, so nobody is told."""
        self.pin_run(first)
        run = self.runs.pop(first)
        for unit in range(run.first, run.end):
            self._give_back(unit)
        self._changes += 1

    # the pool as a whole

    def check_integrity(self) -> None:
        """Compare every count and index with the owners; O(units), so for tests and for idle moments.

        Raises:
            AssertionError: our bookkeeping is wrong; the message says where.
        """
        is_kv = self.owner == KV
        is_cached = is_kv & (self.refs == 0)
        _require(self.num_free == int((self.owner == FREE).sum()), "free units are miscounted")
        _require(self.num_cached == int(is_cached.sum()), "cached blocks are miscounted")
        _require(not bool((self.refs < 0).any()), "a block was released more often than shared")
        _require(not bool((~is_kv & (self.refs != 0)).any()), "a unit that holds no K/V has users")
        _require(self.num_run_units == int((self.owner == RUN).sum()), "units of runs are miscounted")
        idle = {run.first: run.num_units for run in self.runs.values() if run.is_idle}
        _require(self.num_idle_run_units == sum(idle.values()), "idle units are miscounted")
        _require(set(self._idle_runs) == set(idle), "the list of idle runs is wrong")
        _require(set(self._lru) == set(np.flatnonzero(is_cached).tolist()) | set(idle), "the LRU list is wrong")
        for run in self.runs.values():
            _require(bool((self.owner[run.first : run.end] == RUN).all()), f"run at {run.first} lost units")
        for block_hash, unit in self._by_hash.items():
            _require(self._hash_of[unit] == block_hash and bool(is_kv[unit]), f"unit {unit} is found by a stale hash")
        _require(sum(h is not None for h in self._hash_of) == len(self._by_hash), "a hash finds no unit")
        free = np.flatnonzero(self.owner == FREE).tolist()
        _require(set(free) <= set(self._free_heap), "a free unit cannot be found")
        _require(len(self._free_heap) == sum(self._in_heap), "a unit is twice in the heap")

    def _pop_free(self) -> int:
        while True:
            unit = heapq.heappop(self._free_heap)
            self._in_heap[unit] = 0
            if self.owner[unit] == FREE:
                return unit

    def _give_back(self, unit: int) -> None:
        self.owner[unit] = FREE
        self.num_free += 1
        if not self._in_heap[unit]:
            self._in_heap[unit] = 1
            heapq.heappush(self._free_heap, unit)

    def _forget_hash(self, unit: int) -> None:
        block_hash = self._hash_of[unit]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hash_of[unit] = None

    def _evict_oldest(self) -> None:
        unit = next(iter(self._lru))
        if self.owner[unit] == KV:
            self._evict_block(unit)
            return
        cheapest = self.cheapest_idle_run()
        assert cheapest is not None, "the oldest idle thing is a run"
        self._evict_run(cheapest, "kv")

    def _loss(self, run: Run) -> float:
        return run.worth * _LOSS_SCALE / (1 + self.tick - run.last_used)

    def _evict_block(self, unit: int) -> None:
        self.num_kv_evictions += 1
        self.discard((unit,))

    def _evict_run(self, first: int, reason: str) -> None:
        self.on_run_evicted(first, reason)
        self.free_run(first)

    def _is_hopeless(self, count: int) -> bool:
        if self._hopeless_run is None:
            return False
        failed_count, changes, tick = self._hopeless_run
        return count >= failed_count and changes == self._changes and tick == self.tick

    def _cheapest_place(self, count: int) -> int | None:
        if count > self.num_available:
            return None
        is_kv = self.owner == KV
        is_cached = is_kv & (self.refs == 0)
        blocked = is_kv & ~is_cached
        loss = np.where(is_cached, _LOSS_SCALE // (1 + self.tick - self.last_used), 0)
        num_places = self.num_units - count + 1
        run_loss = np.zeros(num_places + 1, np.int64)  # differences: +loss where a place begins to touch the run
        for run in self.runs.values():
            if not run.is_idle or run.last_used == self.tick:
                blocked[run.first : run.end] = True
                continue
            weight = int(self._loss(run))
            run_loss[max(0, run.first - count + 1)] += weight
            run_loss[min(num_places, run.end)] -= weight
        return policy.cheapest_window(loss, blocked, run_loss.cumsum()[:-1], count)

    def _clear(self, first: int, end: int) -> None:
        for run in [run for run in self.runs.values() if run.first < end and first < run.end]:
            self._evict_run(run.first, "adapter")
        for unit in np.flatnonzero(self.owner[first:end] == KV).tolist():
            self._evict_block(first + unit)


def _nobody_listens(first: int, reason: str) -> None:
    raise AssertionError(f"run at unit {first} evicted ({reason}), and nobody was told")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"pool: {message}")
