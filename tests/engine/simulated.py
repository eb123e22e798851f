"""A device that cheats in nothing but arithmetic: it keeps K/V and images in units, and notices every clobbered one.

The K/V of a token is a digest of the adapter (once it acts), the tenant and everything before it; a token is drawn
from that digest.
So an answer depends on (adapter, history) alone, and a block that was shared, freed or overwritten wrongly is seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from typing import Any

import numpy as np

from peft_core.traits import AdapterTraits
from server.engine.adapter_manager import AdapterManager
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.errors import StepOutOfMemory
from server.engine.limits import EngineLimits
from server.engine.policy import WorthOf, worth_by_use
from server.engine.request import AdapterTicket, EngineRequest, RequestDelta, SamplingParams, TokenLogprobs
from server.engine.sequence import Sequence, SequenceTable
from server.engine.step import StepOutput, StepPlan, StepResult
from server.engine.token_layout import NEVER, layout_of
from tests.engine.simulated_reader import Memory, SimulatedReader

VOCAB_SIZE = 64
EOS = 63
UNIT_BYTES = 100
BLOCK_SIZE = 4


def ticket(name: str, units: int = 2, **traits: Any) -> AdapterTicket:
    return AdapterTicket(f"key of {name}", name, f"{name}.img", units * UNIT_BYTES, AdapterTraits(**traits))


def ask(
    request_id: str,
    prompt: list[int],
    adapter: AdapterTicket | None = None,
    *,
    max_new_tokens: int = 4,
    salt: str = "",
    deadline_s: float | None = None,
    task_id: int | None = None,
    **params: Any,
) -> EngineRequest:
    params.setdefault("ignore_eos", True)
    sampling = SamplingParams(max_new_tokens=max_new_tokens, **params)
    return EngineRequest(request_id, tuple(prompt), sampling, adapter, salt, deadline_s, task_id)


def _next_digest(digest: int, token: int) -> int:
    return hash((digest, token))


def _digest_of(text: str) -> int:
    return zlib.crc32(text.encode())  # the same in every process, unlike hash(str)


def _layout(request: EngineRequest) -> Any:
    traits = AdapterTraits() if request.adapter is None else request.adapter.traits
    return layout_of(traits, request.token_ids, request.task_id)


def _digests(request: EngineRequest, tokens: Tokens[int]) -> Iterator[int]:
    """After each of the tokens, virtual ones included: the base's until the adapter acts."""
    active_from = NEVER if request.adapter is None else _layout(request).active_from
    digest = _digest_of(f"base|{request.cache_salt}")
    for position, token in enumerate(tokens):
        if position == active_from:
            assert request.adapter is not None
            digest = _next_digest(digest, _digest_of(request.adapter.key))
        digest = _next_digest(digest, int(token))
        yield digest


def _token_of(digest: int, vocab_size: int) -> int:
    return digest % vocab_size


def expected_tokens(request: EngineRequest, count: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """The reference: what the request is answered if nobody else is there and nothing ever goes wrong."""
    tokens: list[int] = _layout(request).tokens(request.token_ids).tolist()
    num_known = len(tokens)
    *_, digest = _digests(request, tokens)
    for _ in range(count):
        tokens.append(_token_of(digest, vocab_size))
        digest = _next_digest(digest, tokens[-1])
    return tokens[num_known:]


class Corruption(BaseException):
    """Memory was overwritten or misread. Not an `Exception`: no engine that survives broken steps may survive this."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Corruption(message)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedResidency:
    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.refuses: set[str] = set()  # keys whose header it cannot bind

    def bind(self, slot: int, image_header: dict[str, Any], offset_bytes: int) -> None:
        _require(slot not in self._memory.bound, f"slot {slot} is bound twice")
        if image_header["key"] in self.refuses:
            raise ValueError("up of layer 0 has the wrong shape")
        first = offset_bytes // UNIT_BYTES
        for unit in range(first, first + image_header["num_units"]):
            _require(self._memory.units[unit] == image_header["key"], "the image was overwritten while it was read")
        self._memory.bound[slot] = (image_header["key"], first)

    def free(self, slot: int) -> None:
        del self._memory.bound[slot]


class SimulatedRunner:
    """`faults` are raised by the next executions, one each (None: none); `poisoned` requests get NaN logits, and
    `unwelcome` ones cannot join.
    """

    def __init__(self, memory: Memory, limits: EngineLimits) -> None:
        self.faults: list[Exception | None] = []
        self.poisoned: set[str] = set()
        self.unwelcome: set[str] = set()
        self.max_tokens: int | None = None  # a step of more runs out of memory
        self.plans: list[StepPlan] = []
        self.joined: dict[int, str] = {}
        self.admitted: list[int] = []  # arrivals, in the order in which they got a row
        self._memory = memory
        self._vocab_size = limits.vocab_size

    def join(self, sequence: Sequence) -> None:
        _require(sequence.row not in self.joined, f"row {sequence.row} is joined twice")
        if sequence.request_id in self.unwelcome:
            raise ValueError("no such bias")
        self.joined[sequence.row] = sequence.request_id
        self.admitted.append(sequence.arrival)

    def forget(self, row: int) -> None:
        del self.joined[row]

    def execute(self, plan: StepPlan, table: SequenceTable) -> StepResult:
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        self._check_plan(plan, table)
        if self.max_tokens is not None and plan.num_tokens > self.max_tokens:
            raise StepOutOfMemory(f"{plan.num_tokens} tokens are more than {self.max_tokens}")
        self.plans.append(plan)
        token_ids, logprobs, prompt_logprobs, failed = [], {}, {}, {}
        for index, sequence in enumerate(plan.sequences):
            digest = self._compute(sequence, table, int(plan.starts[index]), int(plan.counts[index]))
            if sequence.request_id in self.poisoned:
                failed[index] = "logits are not finite"
            if plan.samples[index]:
                token_ids.append(_token_of(digest, self._vocab_size))
                if sequence.params.num_logprobs is not None:
                    logprobs[index] = TokenLogprobs(token_ids[-1], -0.5, 1, ())
            if sequence.wants_prompt_logprobs:
                prompt_logprobs[index] = self._judge_prompt(sequence, plan, index)
        return StepResult(np.array(token_ids, np.int64), logprobs, prompt_logprobs, failed)

    def _check_plan(self, plan: StepPlan, table: SequenceTable) -> None:
        _require(len({*plan.rows.tolist()}) == len(plan.rows), "a row is planned twice")
        _require(bool((plan.counts > 0).all()), "an entry computes nothing")
        _require(bool((plan.starts == table.computed[plan.rows]).all()), "an entry does not go on where it stopped")
        at_end = plan.starts + plan.counts == table.length[plan.rows]
        _require(bool((at_end == plan.samples).all()), "an entry samples before it has caught up")

    def _compute(self, sequence: Sequence, table: SequenceTable, start: int, count: int) -> int:
        row, units = sequence.row, self._memory.units
        name = sequence.request_id
        _require(self.joined[row] == name, f"row {row} is not {name}'s")
        self._check_adapter(sequence, int(table.slot[row]))
        _require(int(table.num_blocks[row]) * BLOCK_SIZE >= start + count, f"{name} has too few blocks")
        digest = 0
        for position, digest in enumerate(_digests(sequence.request, table.tokens[row, : start + count].tolist())):
            unit, offset = int(table.blocks[row, position // BLOCK_SIZE]), position % BLOCK_SIZE
            if position < start:
                known = units[unit].get(offset) if isinstance(units[unit], dict) else units[unit]
                _require(known == digest, f"K/V of {name} at {position} is someone else's")
                continue
            if not isinstance(units[unit], dict):
                units[unit] = {}
            units[unit][offset] = digest
        return digest

    def _check_adapter(self, sequence: Sequence, slot: int) -> None:
        if sequence.adapter is None:
            _require(slot == -1, f"{sequence.request_id} is on the base and has slot {slot}")
            return
        key, first = self._memory.bound[slot]
        _require(key == sequence.adapter.key, f"{sequence.request_id} runs on the adapter of {key}")
        num_units = sequence.adapter.num_bytes // UNIT_BYTES
        image = self._memory.units[first : first + num_units]
        _require(all(unit == key for unit in image), f"the image of {key} was overwritten")

    def _judge_prompt(self, sequence: Sequence, plan: StepPlan, index: int) -> list[TokenLogprobs]:
        start, end = int(plan.starts[index]), int(plan.starts[index] + plan.counts[index])
        prompt, num_virtual = sequence.request.token_ids, sequence.layout.num_virtual
        start, end = max(0, start - num_virtual), end - num_virtual
        _require(start < len(prompt), "a prompt is judged that was told of already")
        return [TokenLogprobs(prompt[p], -float(p), 1, ()) for p in range(start + 1, min(end, len(prompt) - 1) + 1)]


class Bench:
    """An engine on a simulated device, with everything that tests look at."""

    def __init__(
        self,
        *,
        num_units: int = 64,
        max_num_seqs: int = 8,
        max_model_len: int = 128,
        chunk_size: int = 8,
        budget: int = 32,
        max_pass_over_steps: int = 8,
        max_adapter_bytes: int | None = None,
        caching: bool = True,
        worth_of: WorthOf = worth_by_use,
    ) -> None:
        self.clock = Clock()
        self.limits = EngineLimits(max_model_len, VOCAB_SIZE, (EOS,), num_units, UNIT_BYTES)
        config = EngineConfig(
            model="simulated",
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            chunk_size=chunk_size,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=caching,
            max_pass_over_steps=max_pass_over_steps,
        )
        self.memory = Memory([None] * num_units)
        self.blocks = BlockManager(num_units, enable_prefix_caching=caching)
        self.reader = SimulatedReader(self.memory)
        self.residency = SimulatedResidency(self.memory)
        self.runner = SimulatedRunner(self.memory, self.limits)
        self.adapters = AdapterManager(
            self.blocks,
            self.reader,
            self.residency,
            unit_bytes=UNIT_BYTES,
            clock=self.clock,
            max_bytes=max_adapter_bytes,
            worth_of=worth_of,
        )
        self.engine = Engine(config, self.limits, self.runner, self.adapters, self.blocks, self.clock)
        self.answers: dict[str, list[int]] = {}
        self.ends: dict[str, RequestDelta] = {}
        self.outputs: list[StepOutput] = []

    def step(self) -> StepOutput:
        output = self.engine.step()
        self.outputs.append(output)
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            assert request_id not in self.ends
            self.answers.setdefault(request_id, []).append(token_id)
        for delta in output.special:
            assert delta.request_id not in self.ends, "an ended request was told of again"
            assert delta.request_id not in output.request_ids, "a request was told of twice in a step"
            self.answers.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish is not None:
                self.ends[delta.request_id] = delta
        return output

    def run(self, *requests: EngineRequest, max_steps: int = 2000) -> None:
        """Submit, then step until nothing is left to do."""
        for request in requests:
            self.engine.submit(request)
        self.run_until(lambda: not self.engine.has_work, max_steps)

    def run_until(self, is_done: Callable[[], bool], max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if is_done():
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def check_idle(self) -> None:
        """Nothing runs: nothing may be held."""
        assert not self.engine.has_work
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.units_kv, self.adapters.num_pins) == (0, 0, 0, 0)
        assert not self.runner.joined
