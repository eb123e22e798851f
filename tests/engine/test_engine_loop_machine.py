"""Anything in any order: submit, abort, step, load, evict and faults, on a device that notices every wrong byte."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.errors import AdapterBusy, NoRoomForAdapter, RequestRefused, StepOutOfMemory
from server.engine.request import AdapterTicket, EngineRequest, FinishReason
from tests.engine.simulated import Bench, ask, expected_tokens, ticket

ADAPTERS = [
    *(ticket(f"adapter {units}", units) for units in (1, 2, 3, 5, 8)),
    ticket("virtual", num_virtual_tokens=6, first_position=6),
    ticket("prefix", num_virtual_tokens=9, has_prefix=True),
    ticket("invoked", invocation_tokens=(3,)),
    ticket("invoked late", invocation_tokens=(10, 11)),
]
MAX_PASS_OVER_STEPS = 6


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_units=st.integers(10, 20),
        max_num_seqs=st.integers(1, 6),
        latency=st.integers(1, 4),
        caching=st.sampled_from([True, True, False]),
    )
    def begin(self, num_units: int, max_num_seqs: int, latency: int, caching: bool) -> None:
        self.bench = Bench(
            num_units=num_units,
            max_num_seqs=max_num_seqs,
            max_model_len=60,
            chunk_size=8,
            budget=16,
            max_pass_over_steps=MAX_PASS_OVER_STEPS,
            caching=caching,
        )
        self.bench.reader.latency = latency
        self.accepted: dict[str, EngineRequest] = {}
        self.aborted: set[str] = set()
        self.broken: set[str] = set()  # keys that were broken at any time
        self.faults = 0

    @rule(
        adapter=st.none() | st.sampled_from(ADAPTERS),
        prompt_length=st.sampled_from([1, 4, 5, 12, 17, 30]),
        flavour=st.integers(0, 1),
        max_new_tokens=st.integers(1, 30),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        ignore_eos=st.booleans(),
        count=st.integers(1, 4),
    )
    def submit(
        self,
        adapter: AdapterTicket | None,
        prompt_length: int,
        flavour: int,
        max_new_tokens: int,
        prompt_logprobs: int | None,
        ignore_eos: bool,
        count: int,
    ) -> None:
        for _ in range(count):
            request = ask(
                f"r{len(self.accepted)}",
                [(flavour + i) % 60 for i in range(prompt_length)],
                adapter,
                max_new_tokens=max_new_tokens,
                ignore_eos=ignore_eos,
                num_prompt_logprobs=prompt_logprobs,
            )
            try:
                self.bench.engine.submit(request)
            except RequestRefused:
                continue
            self.accepted[request.request_id] = request

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @rule(
        what=st.sampled_from(["abort", "evict", "load", "break", "memory", "nan", "crash", "wait"]),
        adapter=st.sampled_from(ADAPTERS),
        number=st.integers(0, 40),
    )
    def disturb(self, what: str, adapter: AdapterTicket, number: int) -> None:
        if what == "abort":
            self._abort(number)
        elif what == "evict":
            with suppress(AdapterBusy):
                self.bench.engine.evict(adapter.key)
        elif what == "load":
            with suppress(NoRoomForAdapter):
                self.bench.engine.load(adapter)
        elif what == "break":
            self._break_or_mend(adapter.key)
        elif what == "wait":
            self.bench.clock.now += number
        else:
            self._plant(what)

    def _abort(self, number: int) -> None:
        live = [name for name in self.accepted if name not in self.bench.ends]
        if live:
            name = live[number % len(live)]
            assert self.bench.engine.abort(name)
            self.aborted.add(name)

    def _break_or_mend(self, key: str) -> None:
        if self.bench.reader.broken.pop(key, None) is None:
            self.bench.reader.broken[key] = "broken"
            self.broken.add(key)

    def _plant(self, what: str) -> None:
        self.faults += 1
        if what == "memory":
            self.bench.runner.faults.append(StepOutOfMemory("simulated"))
        elif what == "crash":
            self.bench.runner.faults.append(RuntimeError("simulated"))
        elif self.accepted:
            self.bench.runner.poisoned.add(next(reversed(self.accepted)))

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "bench"):
            self.bench.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        for _ in range(3000):
            if not self.bench.engine.has_work:
                break
            self._step()
        assert set(self.bench.ends) == set(self.accepted), "a request was lost, or starves"
        self.bench.check_idle()
        for name, request in self.accepted.items():
            self._check_answer(name, request)

    def _step(self) -> None:
        num_admitted = len(self.bench.runner.admitted)
        self.bench.step()
        new = self.bench.runner.admitted[num_admitted:]
        tick = self.bench.blocks.tick
        for sequence in self.bench.engine._scheduler.waiting:
            since = sequence.lacks_room_since
            if since is not None and tick - since > MAX_PASS_OVER_STEPS:
                assert not any(arrival > sequence.arrival for arrival in new), "it was old, and was overtaken"

    def _check_answer(self, name: str, request: EngineRequest) -> None:
        end, answer = self.bench.ends[name], self.bench.answers[name]
        assert answer == expected_tokens(request, len(answer)), "disturbed by its neighbours"
        if end.finish is FinishReason.ABORTED:
            assert name in self.aborted
        elif end.finish is FinishReason.FAILED:
            broken = request.adapter is not None and request.adapter.key in self.broken
            assert broken or self.faults
        elif end.finish is FinishReason.LENGTH:
            assert 1 <= len(answer) <= request.params.max_new_tokens
        if answer and request.params.num_prompt_logprobs is not None:
            told = [d.prompt_logprobs for o in self.bench.outputs for d in o.special if d.request_id == name]
            lengths = [len(records) for records in told if records is not None]
            assert lengths == [len(request.token_ids)]


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
