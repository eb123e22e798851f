"""The engine: requests in, steps, tokens out. It introduces scheduler, adapters and runner; each knows only its part.

    step():  reads that ended -> aborts, deadlines -> schedule -> runner -> append tokens, end what ends -> StepOutput

One thread calls everything here. A step is synchronous; between steps the pool, the table and the pins agree
(`check_integrity`). Every accepted request ends in exactly one of finished, aborted and failed, told by one delta.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from server.engine import policy
from server.engine.acceptance import check_request, max_length_of, vocab_size_of
from server.engine.adapter_manager import AdapterManager
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.errors import (
    DeadlineExceeded,
    EngineError,
    InvalidLogits,
    InvalidRequest,
    OutOfMemory,
    StepFailed,
    StepOutOfMemory,
)
from server.engine.limits import EngineLimits
from server.engine.request import (
    AdapterState,
    AdapterTicket,
    EngineErrorRecord,
    EngineRequest,
    FinishReason,
    RequestDelta,
    ResidentAdapter,
    Tier,
)
from server.engine.scheduler import PREFETCH_WINDOW, Scheduler
from server.engine.sequence import BoolArray, Int32Array, Sequence, SequenceStatus, SequenceTable
from server.engine.shedding import TokenBudget, first_half
from server.engine.stats import EngineStats, StepTotals
from server.engine.step import Runner, StepOutput, StepPlan, StepResult

_log = logging.getLogger(__name__)


class Engine:
    """The one door of everything in this process; `server.engine.client` is the async door to it."""

    def __init__(
        self,
        config: EngineConfig,
        limits: EngineLimits,
        runner: Runner,
        adapters: AdapterManager,
        blocks: BlockManager,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._block_size = config.block_size
        self._limits = limits
        self._runner = runner
        self._adapters = adapters
        self._blocks = blocks
        self._clock = clock
        self._table = SequenceTable(config.max_num_seqs, limits.max_model_len, config.block_size)
        self._scheduler = Scheduler(config, self._table, blocks, adapters, runner)
        self._budget = TokenBudget(config.max_num_batched_tokens)
        self._totals = StepTotals()
        self._live: dict[str, Sequence] = {}
        self._aborted: list[Sequence] = []
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; entries of ended sequences are stale
        self._num_arrivals = 0
        self._is_eos: BoolArray = np.zeros(limits.vocab_size, np.bool_)
        self._is_eos[list(limits.eos_token_ids)] = True

    @property
    def has_work(self) -> bool:
        """Something is accepted and not ended, an adapter is loading, or a change is not told: call `step` again."""
        return bool(self._live) or self._adapters.has_work

    def submit(self, request: EngineRequest) -> None:
        """Accept the request: from now on it ends in exactly one of finished, aborted and failed.

        Raises:
            InvalidRequest: a field out of range, or a request id that is in use.
            RequestTooLong: it could never run.
            AdapterTooLarge: its adapter could never be loaded.
        """
        check_request(request, self._limits)
        if request.request_id in self._live:
            raise InvalidRequest(f"request_id {request.request_id!r} is in use by a request that has not ended.")
        adapter_units = 0
        if request.adapter is not None:
            self._adapters.check_size(request.adapter)
            adapter_units = self._adapters.units_of(request.adapter)
        max_length = max_length_of(request, self._limits, block_size=self._block_size, adapter_units=adapter_units)
        if (more := vocab_size_of(request, self._limits) - len(self._is_eos)) > 0:
            self._is_eos = np.pad(self._is_eos, (0, more))
        now_s = self._clock()
        deadline = None if request.deadline_s is None else now_s + request.deadline_s
        self._num_arrivals += 1
        sequence = Sequence(request, self._num_arrivals, max_length=max_length, deadline=deadline, submitted_s=now_s)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, sequence.arrival, sequence))
        self._live[request.request_id] = sequence
        if sequence.adapter is not None:
            self.expect(sequence.adapter)
        self._scheduler.waiting.add(sequence)

    def expect(self, ticket: AdapterTicket) -> None:
        """A request for this adapter is on its way: bring the adapter near, and to the device if its turn is soon."""
        self._adapters.expect(ticket, may_take_room=len(self._scheduler.waiting) < PREFETCH_WINDOW)

    def abort(self, request_id: str) -> bool:
        """End the request at the next step; False if it has ended (or never was)."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        self._aborted.append(sequence)
        return True

    def load(self, ticket: AdapterTicket, tier: Tier = Tier.DEVICE) -> AdapterState:
        """Bring the adapter to a tier; see `AdapterManager.load`. Its end is told as an event of a later step."""
        return self._adapters.load(ticket, tier)

    def evict(self, key: str, tier: Tier = Tier.DEVICE) -> bool:
        """Take the adapter out of a tier; see `AdapterManager.evict`."""
        return self._adapters.evict(key, tier)

    def keep(self, tickets: list[AdapterTicket]) -> None:
        """The adapters that stay on the device from now on; see `AdapterManager.keep`."""
        self._adapters.keep(tickets)

    def residents(self, *, with_past: bool = False) -> list[ResidentAdapter]:
        return self._adapters.residents(with_past=with_past)

    def step(self) -> StepOutput:
        """Run one step and tell everything that changed. With nothing to run it only looks after loads and ends."""
        output = StepOutput()
        started_s = self._scheduler.now_s = self._clock()
        self._adapters.poll()
        self._end_aborted(output)
        self._end_expired(output)
        plan = self._scheduler.schedule(self._budget.tokens)
        for sequence, error in self._scheduler.take_failed():
            self._end(sequence, FinishReason.FAILED, output, error=error)
        if len(plan.rows):
            self._run(plan, output)
            self._totals.last_step_s = self._clock() - started_s
        if not self._live:
            self._adapters.load_kept()  # there may be no further step that would
        output.adapter_events = self._adapters.take_events()
        return output

    def check_integrity(self) -> None:
        """Compare pool, pins, table and queue with each other; for tests and for idle moments.

        Raises:
            AssertionError: our bookkeeping is wrong; the message says where.
        """
        running = [self._table.sequences[row] for row in self._table.active_rows()]
        pins: dict[str, int] = {}
        for sequence in running:
            if sequence.adapter is not None:
                pins[sequence.key] = pins.get(sequence.key, 0) + 1
        self._blocks.check_integrity()
        self._adapters.check_integrity(pins)
        refs = np.zeros(self._blocks.num_units, np.int32)
        for sequence in running:
            refs[self._table.blocks[sequence.row, : self._table.num_blocks[sequence.row]]] += 1
        if not np.array_equal(refs, self._blocks.refs):
            raise AssertionError("engine: the pool counts other users of blocks than the table has")
        known = {s.request_id for s in running} | {s.request_id for s in self._scheduler.waiting}
        if known != set(self._live):
            raise AssertionError(f"engine: requests lost or kept: {sorted(known ^ set(self._live))}")

    def stats(self) -> EngineStats:
        blocks, adapters, scheduler = self._blocks, self._adapters, self._scheduler
        return replace(
            self._totals.snapshot(),
            num_running=self._table.num_active,
            num_waiting=len(scheduler.waiting),
            num_waiting_for_adapter=scheduler.num_passed_over if len(scheduler.waiting) else 0,
            num_units=blocks.num_units,
            units_free=blocks.num_free,
            units_kv=blocks.num_used,
            units_cached=blocks.num_cached,
            units_adapters_pinned=blocks.num_run_units - blocks.num_idle_run_units,
            units_adapters_idle=blocks.num_idle_run_units,
            num_adapters_resident=adapters.num_resident,
            num_adapters_loading=adapters.num_loading,
            total_prompt_tokens=scheduler.num_prompt_tokens,
            total_prefix_queries=scheduler.num_prefix_queries,
            total_prefix_hits=scheduler.num_prefix_hits,
            total_preemptions=scheduler.num_preemptions,
            total_adapter_loads=adapters.num_loads,
            total_adapter_load_failures=adapters.num_load_failures,
            total_adapter_evictions=dict(adapters.evictions),
            total_kv_evictions=blocks.num_kv_evictions,
            total_adapter_load_s=dict(adapters.load_s),
            total_host_hits=adapters.reader.num_host_hits,
            host_bytes=adapters.reader.host_bytes,
        )

    def _end_aborted(self, output: StepOutput) -> None:
        for sequence in self._aborted:
            if not sequence.status.has_ended:
                self._end(sequence, FinishReason.ABORTED, output)
        self._aborted.clear()

    def _end_expired(self, output: StepOutput) -> None:
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if not sequence.status.has_ended:
                error = DeadlineExceeded(f"its deadline of {sequence.request.deadline_s} s passed before it had ended")
                self._end(sequence, FinishReason.FAILED, output, error=error)

    def _run(self, plan: StepPlan, output: StepOutput) -> None:
        """Execute the plan, or as much of it as the device holds, and take over what came of it."""
        while True:
            try:
                result = self._runner.execute(plan, self._table)
            except StepOutOfMemory as error:
                _log.warning("a step of %d tokens ran out of memory and is retried smaller: %s", plan.num_tokens, error)
                self._totals.total_steps_shed += 1
                if len(plan.rows) == 1:
                    self._fail_plan(plan, OutOfMemory(f"not even alone did it fit the device: {error}"), output)
                    return
                plan = first_half(plan)
                self._budget.shrink(plan.num_tokens)
            except Exception as error:
                _log.exception("a step of %d sequences failed", len(plan.rows))
                self._totals.total_steps_failed += 1
                self._fail_plan(plan, StepFailed(f"the step broke: {type(error).__name__}: {error}"), output)
                return
            else:
                break
        self._budget.recover()
        self._totals.count_step(plan, self._table.slot[plan.rows])
        output.num_tokens = plan.num_tokens
        self._conclude(plan, result, output)

    def _fail_plan(self, plan: StepPlan, error: EngineError, output: StepOutput) -> None:
        for sequence in plan.sequences:
            self._end(sequence, FinishReason.FAILED, output, error=error)

    def _conclude(self, plan: StepPlan, result: StepResult, output: StepOutput) -> None:
        """Append the sampled tokens; the ordinary case is arrays only, whatever says more is told one by one."""
        table = self._table
        table.computed[plan.rows] = plan.starts + plan.counts
        for index, records in result.prompt_logprobs.items():
            told = plan.sequences[index].prompt_logprobs
            if told is not None:
                told.extend(records)
        for index, reason in result.failed.items():
            sequence = plan.sequences[index]
            self._scheduler.discard_blocks(sequence)
            self._end(sequence, FinishReason.FAILED, output, error=InvalidLogits(reason))
        for index in np.flatnonzero(plan.counts > 1).tolist():
            if index not in result.failed:
                self._scheduler.register_computed(plan.sequences[index])
        indices = np.flatnonzero(plan.samples)
        token_ids = result.token_ids.astype(np.int32)
        if result.failed:
            sound = ~np.isin(indices, list(result.failed))
            indices, token_ids = indices[sound], token_ids[sound]
        self._append(plan, indices.tolist(), plan.rows[indices], token_ids, result, output)

    def _append(
        self,
        plan: StepPlan,
        indices: list[int],
        rows: Int32Array,
        token_ids: Int32Array,
        result: StepResult,
        output: StepOutput,
    ) -> None:
        table = self._table
        table.tokens[rows, table.length[rows]] = token_ids
        table.length[rows] += 1
        codes = policy.endings(table, rows, token_ids, self._is_eos)
        is_ordinary = (codes == policy.GOES_ON) & ~table.is_special[rows]
        output.request_ids = table.request_ids[rows[is_ordinary]].tolist()
        output.token_ids = token_ids[is_ordinary].tolist()
        if result.logprobs:
            output.logprobs = [result.logprobs.get(indices[place]) for place in np.flatnonzero(is_ordinary).tolist()]
        self._totals.total_generation_tokens += len(rows)
        for place in np.flatnonzero(~is_ordinary).tolist():
            index = indices[place]
            reason = policy.REASONS.get(int(codes[place]))
            self._tell(plan.sequences[index], int(token_ids[place]), reason, result, index, output)

    def _tell(
        self,
        sequence: Sequence,
        token_id: int,
        reason: FinishReason | None,
        result: StepResult,
        index: int,
        output: StepOutput,
    ) -> None:
        """One token of a sequence of which there is more to say: its first, its last, or one with alternatives."""
        row = sequence.row
        is_first = int(self._table.length[row]) == sequence.prompt_length + 1
        told, record = None, result.logprobs.get(index)
        if is_first:
            self._table.is_special[row] = bool(sequence.params.num_logprobs)
            told, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        delta = RequestDelta(
            sequence.request_id,
            token_ids=(token_id,),
            logprobs=() if record is None else (record,),
            prompt_logprobs=None if told is None else tuple(told),
            num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
            queue_s=sequence.queue_s if is_first else 0.0,
        )
        if reason is None:
            output.special.append(delta)
        else:
            self._end(sequence, reason, output, delta=delta)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        output: StepOutput,
        *,
        error: EngineError | None = None,
        delta: RequestDelta | None = None,
    ) -> None:
        """The one way out for every accepted request."""
        status = _STATUS_OF.get(reason, SequenceStatus.FINISHED)
        if sequence.status is SequenceStatus.RUNNING:
            self._scheduler.vacate(sequence, status, keep_blocks=reason is not FinishReason.FAILED)
        else:
            self._scheduler.withdraw(sequence, status)
        del self._live[sequence.request_id]
        self._totals.finished[reason.value] += 1
        record = None if error is None else EngineErrorRecord(error.kind, str(error), error.retryable)
        output.special.append(replace(delta or RequestDelta(sequence.request_id), finish=reason, error=record))


_STATUS_OF = {FinishReason.ABORTED: SequenceStatus.ABORTED, FinishReason.FAILED: SequenceStatus.FAILED}
