"""Which sequences compute which tokens in the next step.

There is no prefill phase and no decode phase: every sequence gets tokens until what is computed has caught up with
what is known (as vLLM's v1 scheduler does it). Running sequences come first, then the waiting ones by arrival.

    WAITING --admit: row, pin, blocks--> RUNNING --vacate--> ended
       ^                                   |
       +--- preempt: full blocks stay cached, row and pin go --+ (the youngest, when a running one finds no block)

A sequence whose adapter is not on the device is passed over, not waited for. Once it has lacked room (for the adapter
or for its blocks) for `max_pass_over_steps` steps, nothing younger is admitted before it.
"""

from __future__ import annotations

import logging
from enum import Enum, auto

import numpy as np

from server.engine import block_hash, policy
from server.engine.adapter_manager import AdapterManager
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.errors import AdapterLoadFailed, EngineError, StepFailed
from server.engine.sequence import BASE_SLOT, Int32Array, Sequence, SequenceStatus, SequenceTable
from server.engine.step import Runner, StepPlan
from server.engine.waiting import WaitingQueue

_MAX_SCANNED = 512  # waiting sequences looked at in one step
PREFETCH_WINDOW = 16  # of those, how many may start a load although the batch is full

_log = logging.getLogger(__name__)


class _Verdict(Enum):
    ADMITTED = auto()
    FAILED = auto()
    NO_ADAPTER = auto()  # it is being loaded, or there is no room for it
    BATCH_FULL = auto()  # no row, or no budget of tokens
    NO_BLOCKS = auto()


class Scheduler:
    """Owns the waiting queue; moves sequences into and out of the table, and their pins and blocks with them."""

    def __init__(
        self,
        config: EngineConfig,
        table: SequenceTable,
        blocks: BlockManager,
        adapters: AdapterManager,
        runner: Runner,
    ) -> None:
        self.waiting = WaitingQueue()
        self.table = table
        self.now_s = 0.0  # on the engine's clock, set before each `schedule`
        self.num_preemptions = 0
        self.num_passed_over = 0  # in the last step
        self.num_prompt_tokens = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._chunk_size = config.chunk_size
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self._max_pass_over_steps = config.max_pass_over_steps
        self._blocks = blocks
        self._adapters = adapters
        self._runner = runner
        self._reserve = 0  # tokens kept from decodes in this step, for a prefill they crowded out in the last
        self._failed: list[tuple[Sequence, EngineError]] = []

    def schedule(self, budget: int) -> StepPlan:
        """The next step, of at most `budget` tokens (more only if a single chunk is larger); may be empty.

        Advances the pool's tick; admits, preempts and starts loads.
        """
        self._blocks.tick += 1
        num_preemptions = self.num_preemptions
        rows, counts = self._continue_running(budget)
        if self.num_preemptions == num_preemptions:
            rows, counts = self._admit(rows, counts, budget - int(counts.sum()))
        starts = self.table.computed[rows]
        return StepPlan(
            sequences=self.table.sequences[rows].tolist(),
            rows=rows,
            starts=starts,
            counts=counts,
            samples=starts + counts == self.table.length[rows],
        )

    def take_failed(self) -> list[tuple[Sequence, EngineError]]:
        """Waiting sequences that can never run, since the last call; the caller withdraws them."""
        failed, self._failed = self._failed, []
        return failed

    def withdraw(self, sequence: Sequence, status: SequenceStatus) -> None:
        """End a sequence that is not running; it leaves the queue."""
        self.waiting.remove(sequence)
        sequence.status = status

    def register_computed(self, sequence: Sequence) -> None:
        """Let others find the sequence's full computed blocks."""
        if not self._caching:
            return
        row = sequence.row
        num_full = int(self.table.computed[row]) // self._block_size
        hashes = block_hash.hashes_of(sequence, self.table.tokens[row], num_full, self._block_size)
        for unit, name in zip(self.table.blocks[row, :num_full].tolist(), hashes, strict=False):
            self._blocks.register(unit, name)

    def vacate(self, sequence: Sequence, status: SequenceStatus, *, keep_blocks: bool) -> None:
        """Take a running sequence out of its row; its full blocks stay cached if they are to be kept."""
        row = sequence.row
        if keep_blocks:
            self.register_computed(sequence)
        self._runner.forget(row)
        self._blocks.release(self.table.blocks[row, : self.table.num_blocks[row]])
        slot = int(self.table.slot[row])
        self.table.leave(sequence)
        if slot != BASE_SLOT:
            self._adapters.release(slot)
        sequence.status = status

    def discard_blocks(self, sequence: Sequence) -> None:
        """Nobody may find the sequence's blocks any more: their contents are doubtful."""
        row = sequence.row
        self._blocks.discard(self.table.blocks[row, : self.table.num_blocks[row]].tolist())

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue, at the place of its arrival; it will recompute what the cache has lost by then."""
        self.vacate(sequence, SequenceStatus.PREEMPTED, keep_blocks=True)
        if sequence.wants_prompt_logprobs:
            sequence.prompt_logprobs = [None]
        self.waiting.add(sequence)
        self.num_preemptions += 1

    def _continue_running(self, budget: int) -> tuple[Int32Array, Int32Array]:
        """Rows and counts of the running sequences that run now, their blocks assured."""
        table = self.table
        reserve, self._reserve = self._reserve, 0
        while True:
            rows = table.active_rows().astype(np.int32)
            counts = policy.chunk_counts(table.computed[rows], table.length[rows], self._chunk_size)
            order = policy.order_of_service(counts, table.arrival[rows])
            rows, counts = rows[order], counts[order]
            chosen = policy.fit_budget(counts, budget, reserve=reserve)
            self._reserve = _crowded_out(counts, counts[chosen])
            rows, counts = rows[chosen], counts[chosen]
            if self._extend_blocks(rows, table.computed[rows] + counts):
                return rows, counts
            self.preempt(self._youngest())

    def _extend_blocks(self, rows: Int32Array, ends: Int32Array) -> bool:
        """Give the rows the blocks they lack up to `ends`; False, and no change, if the pool has not got them."""
        table = self.table
        held = table.num_blocks[rows]
        lacks = np.maximum(policy.blocks_for(ends, self._block_size) - held, 0)
        total = int(lacks.sum())
        if total == 0:
            return True
        units = self._blocks.allocate(total)
        if units is None:
            return False
        # Rows lacking [2, 0, 1] blocks: owners [0, 0, 2], place within the owner's new blocks [0, 1, 0].
        owners = np.repeat(np.arange(len(rows)), lacks)
        places = np.arange(total) - np.repeat(lacks.cumsum() - lacks, lacks)
        table.blocks[rows[owners], held[owners] + places] = units
        table.num_blocks[rows] = held + lacks
        return True

    def _youngest(self) -> Sequence:
        rows = self.table.active_rows()
        youngest: Sequence = self.table.sequences[rows[self.table.arrival[rows].argmax()]]
        return youngest

    def _admit(self, rows: Int32Array, counts: Int32Array, budget: int) -> tuple[Int32Array, Int32Array]:
        """Add waiting sequences, oldest first, to the rows and counts of the step."""
        new_rows: list[int] = []
        new_counts: list[int] = []
        absent: set[str] = set()  # adapters found not to be on the device in this step
        self.num_passed_over = 0
        head = self.waiting.head(_MAX_SCANNED)
        for index, sequence in enumerate(head):
            is_first = not len(rows) and not new_rows
            verdict, count = self._try_admit(sequence, budget, absent, is_first=is_first)
            if verdict is _Verdict.ADMITTED:
                new_rows.append(sequence.row)
                new_counts.append(count)
                budget -= count
            elif verdict is _Verdict.BATCH_FULL:
                self._prefetch(head[index : index + PREFETCH_WINDOW], absent)
                break
            elif verdict is not _Verdict.FAILED and self._holds_others(sequence, verdict):
                break
        if new_rows or not head:
            self._adapters.resume_kept()
        elif not self.table.num_active and not self._adapters.num_loading:
            self._adapters.yield_kept()  # who waits may need just their room, and nobody else will leave
        rows = np.concatenate((rows, np.array(new_rows, np.int32)))
        return rows, np.concatenate((counts, np.array(new_counts, np.int32)))

    def _try_admit(self, sequence: Sequence, budget: int, absent: set[str], *, is_first: bool) -> tuple[_Verdict, int]:
        """The verdict and, if admitted, the tokens of its first chunk. The first of a step may exceed the budget."""
        if self.table.num_free_rows == 0 or (budget <= 0 and not is_first):
            return _Verdict.BATCH_FULL, 0
        slot = BASE_SLOT
        if sequence.adapter is not None:
            try:
                acquired = None if sequence.key in absent else self._adapters.acquire(sequence.adapter)
            except AdapterLoadFailed as error:
                self._failed.append((sequence, error))
                return _Verdict.FAILED, 0
            if acquired is None:
                absent.add(sequence.key)
                return _Verdict.NO_ADAPTER, 0
            slot = acquired
        verdict, count = self._try_seat(sequence, slot, None if is_first else budget)
        if verdict is not _Verdict.ADMITTED and slot != BASE_SLOT:
            self._adapters.release(slot)
        return verdict, count

    def _try_seat(self, sequence: Sequence, slot: int, budget: int | None) -> tuple[_Verdict, int]:
        """Blocks for all its tokens, then a row; nothing changes unless it is admitted."""
        length = len(sequence.tokens)
        hits = self._find_prefix(sequence)
        start = len(hits) * self._block_size
        count = min((start // self._chunk_size + 1) * self._chunk_size, length) - start
        if budget is not None and count > budget:
            self._reserve = max(self._reserve, count)
            return _Verdict.BATCH_FULL, 0
        self._blocks.share(hits)
        num_new = -(-length // self._block_size) - len(hits)
        # One block in reserve for each running sequence, or the newcomer would be preempted at once.
        has_room = self._blocks.num_available >= num_new + self.table.num_active
        units = self._blocks.allocate(num_new) if has_room else None
        if units is None:
            self._blocks.release(np.array(hits, np.int32))
            return _Verdict.NO_BLOCKS, 0
        row = self.table.join(sequence, slot)
        self.table.blocks[row, : len(hits)] = hits
        self.table.blocks[row, len(hits) : len(hits) + num_new] = units
        self.table.num_blocks[row] = len(hits) + num_new
        self.table.computed[row] = start
        return (_Verdict.ADMITTED, count) if self._begin(sequence, start) else (_Verdict.FAILED, 0)

    def _begin(self, sequence: Sequence, num_cached_tokens: int) -> bool:
        """Introduce the seated sequence to the runner; False, and it is failed, if the runner will not have it."""
        try:
            self._runner.join(sequence)
        except Exception as error:
            _log.exception("request %s could not join the batch", sequence.request_id)
            self._blocks.release(self.table.blocks[sequence.row, : self.table.num_blocks[sequence.row]])
            self.table.leave(sequence)
            self._failed.append((sequence, StepFailed(f"it could not join the batch: {error}")))
            return False
        self.waiting.remove(sequence)
        if sequence.status is SequenceStatus.WAITING:
            num_tokens = sequence.prompt_length - sequence.layout.num_virtual
            sequence.num_cached_tokens = max(0, num_cached_tokens - sequence.layout.num_virtual)
            self.num_prompt_tokens += num_tokens
            self.num_prefix_queries += num_tokens
            self.num_prefix_hits += sequence.num_cached_tokens
        sequence.status = SequenceStatus.RUNNING
        sequence.lacks_room_since = None
        return True

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Units of its cached prefix; the last token is always computed, since its logits are wanted."""
        if not self._caching or sequence.wants_prompt_logprobs:
            return []
        num_blocks = (len(sequence.tokens) - 1) // self._block_size
        hashes = block_hash.hashes_of(sequence, sequence.tokens, num_blocks, self._block_size)
        return self._blocks.match(hashes[:num_blocks])

    def _holds_others(self, sequence: Sequence, verdict: _Verdict) -> bool:
        """True if nothing younger may be admitted in this step, because this one lacks room and has its turn.

        Who lacks blocks holds its place at once; who lacks its adapter is passed over, until it has lacked room for too
        long. From then on it holds the others even while its load runs: they would take the blocks it needs after it.
        """
        if verdict is _Verdict.NO_ADAPTER:
            self.num_passed_over += 1
        if sequence.lacks_room_since is None:
            sequence.lacks_room_since = self._blocks.tick
        started = self._adapters.load_started(sequence.key) if verdict is _Verdict.NO_ADAPTER else None
        if started is not None and started <= sequence.lacks_room_since:
            return False  # its first load: it lacks nothing but time, unlike one whose adapter was thrown out again
        is_old = self._blocks.tick - sequence.lacks_room_since >= self._max_pass_over_steps
        return is_old or verdict is _Verdict.NO_BLOCKS

    def _prefetch(self, sequences: list[Sequence], absent: set[str]) -> None:
        """The batch is full: use the time to bring the adapters of those who are next to the device."""
        present: list[str] = []
        for sequence in sequences:
            if sequence.adapter is None or sequence.key in absent:
                continue
            absent.add(sequence.key)
            try:
                if self._adapters.prefetch(sequence.adapter):
                    present.append(sequence.key)
            except AdapterLoadFailed as error:
                self._failed.append((sequence, error))
        # Whose turn comes first has to be used last, or growing neighbours would throw out just that one.
        for key in reversed(present):
            self._adapters.touch(key)


def _crowded_out(counts: Int32Array, chosen: Int32Array) -> int:
    """Tokens of the oldest prefill if none of the prefills was chosen, else 0."""
    prefills = counts[counts > 1]
    return int(prefills[0]) if len(prefills) and not bool((chosen > 1).any()) else 0
