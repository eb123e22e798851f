"""Text in, text out, through the front with an engine that answers "A" by "BCDEF..."."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from peft_core.traits import AdapterTraits
from server.engine.client import EngineClient
from server.engine.config import EngineConfig
from server.engine.launch import in_process, in_thread
from server.engine.request import AdapterTicket, SamplingParams
from server.front.errors import AdapterFailed, EngineGone, GenerationFailed, InvalidRequest, Overloaded, PromptTooLong
from server.front.front import Front
from server.front.text import TextDelta, TextFinish, TextFinishReason, TextRequest
from server.front.tokenizer import TextTokenizer
from tests.engine.fake_engine import build_engine
from tests.front.letters import BOS, EOS, letters


class UnknownAdapter(Exception):
    pass


@dataclass
class Lease:
    ticket: AdapterTicket
    held: list[Lease]
    report: dict[str, Any] = field(default_factory=dict)
    version: Any = field(default_factory=lambda: SimpleNamespace(name="sql", version=3))

    def release(self) -> None:
        if self in self.held:
            self.held.remove(self)


class Resolver:
    """Knows a few adapters, and who holds them."""

    def __init__(self) -> None:
        self.held: list[Lease] = []

    async def resolve(self, reference: str, key: str | None = None) -> Lease:
        await asyncio.sleep(0)
        if reference not in ("sql", "broken", "prompted", "tasks", "wide"):
            raise UnknownAdapter(reference)
        traits = {
            "prompted": AdapterTraits(num_virtual_tokens=10, first_position=10),
            "wide": AdapterTraits(vocab_size=302),
            "tasks": AdapterTraits(num_virtual_tokens=10, first_position=10, num_tasks=3),
        }.get(reference, AdapterTraits())
        ticket = AdapterTicket(reference, f"{reference}@3", f"/{reference}.img", 10, traits)
        lease = Lease(ticket, self.held)
        if reference == "wide":
            lease.report["added_tokens"] = [[300, "<|new|>", True], [301, "<more>", False]]
        self.held.append(lease)
        return lease


@dataclass
class House:
    front: Front
    resolver: Resolver

    def kill_engine(self) -> None:
        """Only an engine that is a process can be killed."""
        assert self.front.engine.pid is not None
        os.kill(self.front.engine.pid, signal.SIGKILL)


@asynccontextmanager
async def house(
    script: str = "fake",
    *,
    max_num_seqs: int = 8,
    max_queued: int = 8,
    adds_bos: bool = False,
    is_process: bool = False,
) -> AsyncIterator[House]:
    launch = in_process("tests.engine.fake_engine:build_engine") if is_process else in_thread(build_engine)
    engine = await EngineClient.start(EngineConfig(script, max_num_seqs=max_num_seqs), launch=launch)
    resolver = Resolver()
    tokenizer = TextTokenizer(letters(adds_bos=adds_bos), frozenset({BOS, EOS}))
    front = Front(engine, resolver, tokenizer, max_queued_requests=max_queued)
    try:
        yield House(front, resolver)
        assert resolver.held == []
        assert engine.num_in_flight == 0
        assert all(counts.num_in_flight == 0 for counts in front.metrics.adapters.values())
    finally:
        await front.close()


def ask(prompt: str | tuple[int, ...] = "A", num_tokens: int = 5, **fields: Any) -> TextRequest:
    return TextRequest(prompt, fields.pop("params", None) or SamplingParams(num_tokens, ignore_eos=True), **fields)


async def answer(front: Front, request: TextRequest) -> tuple[str, TextFinish, list[TextDelta]]:
    deltas = [delta async for delta in front.generate(request)]
    finish = deltas[-1].finish
    assert finish is not None
    assert [delta for delta in deltas[:-1] if delta.finish] == []
    text = "".join(delta.text for delta in deltas)
    assert text == finish.generated_text
    return text, finish, deltas


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 30)

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it never happened")


def test_a_prompt_is_continued_and_everything_is_told_at_the_end() -> None:
    async def scene() -> None:
        async with house(adds_bos=True) as at:
            text, finish, deltas = await answer(at.front, ask(params=SamplingParams(5, seed=7, ignore_eos=True)))
            assert text == "BCDEF"
            assert (finish.reason, finish.num_generated, finish.num_prompt_tokens) == (TextFinishReason.LENGTH, 5, 2)
            assert finish.seed == 7
            assert 0 <= finish.timing.first_token_s <= finish.timing.total_s
            tokens = [token for delta in deltas for token in delta.tokens]
            assert [(token.id, token.text) for token in tokens] == [(ord(c), c) for c in "BCDEF"]
            assert at.front.metrics.outcomes == {"length": 1}
            assert at.front.metrics.adapters[""].num_generated_tokens == 5

    run(scene())


def test_an_end_of_text_token_is_a_token_without_text() -> None:
    async def scene() -> None:
        async with house() as at:
            text, finish, deltas = await answer(at.front, ask((EOS - 2,), params=SamplingParams(9)))
            assert (text, finish.reason) == ("", TextFinishReason.EOS_TOKEN)
            tokens = [token for delta in deltas for token in delta.tokens]
            assert [(token.id, token.special) for token in tokens] == [(BOS, True), (EOS, True)]

    run(scene())


@pytest.mark.parametrize(
    ("stop", "include_stop", "text", "num_tokens"),
    [
        (("EF",), False, "BCD", 5),
        (("EF",), True, "BCDEF", 5),
        (("CDX", "DE"), False, "BC", 4),
        (("never",), False, "BCDEFGHI", 8),
        (("HIJ",), False, "BCDEFGHI", 8),  # held back to the end, then let go
    ],
)
def test_stop_strings_end_the_answer_across_tokens(
    stop: tuple[str, ...], include_stop: bool, text: str, num_tokens: int
) -> None:
    async def scene() -> None:
        async with house() as at:
            told, finish, deltas = await answer(at.front, ask(num_tokens=8, stop=stop, include_stop=include_stop))
            assert told == text
            assert finish.num_generated == num_tokens == sum(len(delta.tokens) for delta in deltas)
            found = finish.reason is TextFinishReason.STOP_SEQUENCE
            assert found == (num_tokens < 8)
            assert (finish.stop in stop) == found

    run(scene())


def test_a_stop_string_ends_the_work_too() -> None:
    async def scene() -> None:
        async with house("fake step_ms=1") as at:
            await answer(at.front, ask(num_tokens=100_000 // 30, stop=("D",)))
            await until(lambda: at.front.engine.stats().total_finished == {"aborted": 1})
            assert at.front.metrics.outcomes == {"stop_sequence": 1}

    run(scene())


def test_echo_truncation_and_token_prompts() -> None:
    async def scene() -> None:
        async with house() as at:
            assert (await answer(at.front, ask("xA", 2, echo=True)))[0] == "xABC"
            assert (await answer(at.front, ask((120, 65), 2, echo=True)))[0] == "xABC"
            text, finish, _ = await answer(at.front, ask("xxxxA", 2, truncate=3))
            assert (text, finish.num_prompt_tokens) == ("BC", 3)

    run(scene())


def test_logprobs_of_prompt_and_answer_are_told_when_asked_for() -> None:
    async def scene() -> None:
        async with house() as at:
            params = SamplingParams(2, ignore_eos=True, num_logprobs=2, num_prompt_logprobs=0)
            _, _, deltas = await answer(at.front, ask("xA", params=params))
            (prompt_tokens,) = [delta.prompt_tokens for delta in deltas if delta.prompt_tokens is not None]
            assert [(token.text, token.logprob) for token in prompt_tokens] == [("x", None), ("A", -0.5)]
            first = deltas[0].tokens[0]
            assert (first.text, first.logprob) == ("B", -0.25)
            assert [(other.text, other.logprob) for other in first.top] == [("B", -0.25), ("C", -1.25)]
            _, _, plain = await answer(at.front, ask())
            assert plain[0].tokens[0].logprob is None

    run(scene())


def test_several_sequences_are_told_apart_and_have_their_own_seeds() -> None:
    async def scene() -> None:
        async with house() as at:
            params = SamplingParams(4, seed=10, ignore_eos=True)
            deltas = [delta async for delta in at.front.generate(ask(params=params, num_sequences=3))]
            finishes = {delta.sequence: delta.finish for delta in deltas if delta.finish}
            assert [finishes[index].seed for index in range(3)] == [10, 11, 12]
            assert {finish.generated_text for finish in finishes.values()} == {"BCDE"}

    run(scene())


def test_an_adapter_is_leased_until_the_end_whatever_the_end_is() -> None:
    async def scene() -> None:
        async with house("fake step_ms=1") as at:
            generation = await at.front.open(ask(adapter="sql", num_tokens=3000))
            assert generation.adapter == ("sql", 3)
            assert len(at.resolver.held) == 1
            async with aclosing(generation.deltas()) as deltas:
                await anext(deltas)
                assert at.front.metrics.adapters["sql"].num_in_flight == 1
            assert at.resolver.held == []
            never_read = await at.front.open(ask(adapter="sql", num_tokens=3000))
            del never_read
            gc.collect()
            assert at.resolver.held == []
            await answer(at.front, ask(adapter="sql"))
            with pytest.raises(AdapterFailed, match="truncated"):
                await answer(at.front, ask(adapter="broken"))
            with pytest.raises(UnknownAdapter):
                await at.front.open(ask(adapter="nobody"))
            outcomes = at.front.metrics.adapters["sql"].outcomes
            assert outcomes == {"aborted": 2, "length": 1, "failed": 1}
            assert at.front.metrics.outcomes["failed"] == 1

    run(scene())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask(""), "prompt is empty"),
        (ask(()), "prompt is empty"),
        (ask(num_tokens=0), "max_new_tokens is 0"),
        (ask((10, 300)), "token id 300; the model's ids are 0 to 299"),
        (ask("A\udc00"), "surrogate"),
        (ask(stop=("",)), "stop string is empty"),
        (ask(truncate=0), "truncate is 0"),
        (ask(num_sequences=0), "sequences is 0"),
    ],
)
def test_what_can_never_work_is_refused_before_the_engine(request_: TextRequest, words: str) -> None:
    async def scene() -> None:
        async with house() as at:
            with pytest.raises(InvalidRequest, match=words):
                await at.front.open(request_)
            assert at.front.engine.stats().total_finished == {}

    run(scene())


def test_a_request_that_does_not_fit_is_told_all_numbers_or_fitted_if_it_wants() -> None:
    async def scene() -> None:
        async with house("fake max_model_len=20") as at:
            with pytest.raises(
                PromptTooLong, match=r"10 tokens and max_new_tokens is 11, together 21; .* 20 .*most 10"
            ):
                await at.front.open(ask("x" * 10, 11))
            with pytest.raises(PromptTooLong, match="at most 19"):
                await at.front.open(ask("x" * 20, 1, fit_length=True))
            _, finish, _ = await answer(at.front, ask("x" * 10, 2**20, fit_length=True))
            assert finish.num_generated == 10
            _, finish, _ = await answer(at.front, ask("x" * 10, 10))
            assert finish.num_generated == 10

    run(scene())


def test_a_full_queue_turns_away_what_is_over_it_and_nothing_else() -> None:
    async def scene() -> None:
        async with house("fake step_ms=1", max_num_seqs=4, max_queued=6) as at:
            asked = [answer(at.front, ask(num_tokens=50, adapter="sql")) for _ in range(200)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
            assert len(refused) == 190
            assert all(1 <= error.retry_after_s <= 60 for error in refused)
            assert at.front.metrics.num_rejected == 190
            assert at.front.metrics.outcomes == {"length": 10}

    run(scene())


def test_an_engine_that_dies_fails_its_requests_retryably() -> None:
    async def scene() -> None:
        async with house("fake step_ms=1") as at:
            generation = await at.front.open(ask(num_tokens=3000, adapter="sql"))
            deltas = generation.deltas()
            await anext(deltas)
            await at.front.engine.close()
            with pytest.raises(GenerationFailed) as failure:
                async for _ in deltas:
                    pass
            assert failure.value.retryable
            with pytest.raises(EngineGone):
                await at.front.open(ask(adapter="sql"))

    run(scene())


def test_draining_lets_the_accepted_finish() -> None:
    async def scene() -> None:
        async with house("fake step_ms=2") as at:
            running = asyncio.create_task(answer(at.front, ask(num_tokens=30)))
            await until(lambda: at.front.engine.num_in_flight == 1)
            assert await at.front.drain(10) == 0
            assert (await running)[1].num_generated == 30
            with pytest.raises(EngineGone, match="last requests"):
                await at.front.open(ask())

    run(scene())
