"""Generation without a server: many prompts through one engine, answers as they were asked or as they come.

A bounded number of prompts is in flight, so a file of any length passes in constant memory. A prompt that fails is
reported in its place and the run goes on; a prompt that failed because the engine died is tried again.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from server.front.errors import FrontError
from server.front.front import Front
from server.front.text import TextDelta, TextFinish
from server.offline_feed import Feed
from server.offline_input import Asked

_NUM_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.5


class Watcher(Protocol):
    """Who shows how far it is."""

    def on_answer(self, num_done: int, num_failed: int, num_tokens: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    asked: Asked
    finish: TextFinish | None
    code: str = ""  # of the error, if there is no finish
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"index": self.asked.index}
        if self.asked.id is not None:
            data["id"] = self.asked.id
        request, finish = self.asked.request, self.finish
        if request is not None:
            data["adapter"] = request.adapter
        if finish is None:
            return data | {"error": {"code": self.code, "message": self.message}}
        return data | {
            "text": finish.generated_text,
            "finish_reason": finish.reason.value,
            "prompt_tokens": finish.num_prompt_tokens,
            "generated_tokens": finish.num_generated,
            "seed": finish.seed,
        }


@dataclass(slots=True)
class Totals:
    num_done: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def add(self, answer: Answer) -> None:
        self.num_done += 1
        self.num_failed += answer.finish is None
        self.num_tokens += 0 if answer.finish is None else answer.finish.num_generated

    @property
    def summary(self) -> str:
        seconds = max(1e-9, time.monotonic() - self.started_s)
        prompts = f"{self.num_done} prompt{'' if self.num_done == 1 else 's'}"
        rate = f"{self.num_tokens} tokens in {seconds:.1f} s ({self.num_tokens / seconds:.0f} tokens/s)"
        return f"{prompts}, {rate}, {self.num_failed} failed"


async def generate_all(
    front: Front, asked: Iterator[Asked], *, max_in_flight: int, ordered: bool = True
) -> AsyncGenerator[Answer, None]:
    """One answer for every prompt; `asked` is read on a thread, since it may wait for a pipe.

    Ordered, an answer that comes early waits for those before it, at most `max_in_flight` of them.
    """
    feed = Feed(asked)
    running: deque[asyncio.Task[Answer]] = deque()
    reading: asyncio.Task[Asked | None] | None = asyncio.create_task(feed.next())
    try:
        while running or reading is not None:
            waits_for: list[asyncio.Task[Any]] = [running[0]] if running and ordered else [*running]
            can_start = len(running) < max_in_flight
            if reading is not None and can_start:
                waits_for.append(reading)
            await asyncio.wait(waits_for, return_when=asyncio.FIRST_COMPLETED)
            for task in _due(running, ordered):
                running.remove(task)
                yield task.result()
            if reading is not None and can_start and reading.done():
                one = reading.result()
                reading = None if one is None else asyncio.create_task(feed.next())
                if one is not None:
                    running.append(asyncio.create_task(_answer(front, one)))
    finally:
        feed.close()
        left: list[asyncio.Task[Any]] = [*running, *([reading] if reading is not None else [])]
        for unwanted in left:
            unwanted.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def generate_into(
    out: TextIO,
    front: Front,
    asked: Iterator[Asked],
    *,
    as_json: bool,
    max_in_flight: int,
    ordered: bool = True,
    watcher: Watcher | None = None,
) -> Totals:
    """Write every answer to `out`; the totals say whether some failed."""
    totals = Totals()
    async with aclosing(generate_all(front, asked, max_in_flight=max_in_flight, ordered=ordered)) as answers:
        async for answer in answers:
            totals.add(answer)
            text = json.dumps(answer.to_json(), ensure_ascii=False) if as_json else _plain(answer)
            print(text, file=out, flush=True)
            if watcher is not None:
                watcher.on_answer(totals.num_done, totals.num_failed, totals.num_tokens)
    return totals


def _due(running: deque[asyncio.Task[Answer]], ordered: bool) -> list[asyncio.Task[Answer]]:
    """Tasks whose answers may be told now."""
    if not ordered:
        return [task for task in running if task.done()]
    return list(itertools.takewhile(lambda task: task.done(), running))


async def _answer(front: Front, asked: Asked) -> Answer:
    if asked.request is None:
        return Answer(asked, None, "validation", asked.error or "")
    pause_s = _FIRST_PAUSE_S
    for attempt in range(1, _NUM_ATTEMPTS + 1):
        try:
            async with aclosing(front.generate(asked.request)) as deltas:
                return Answer(asked, await _finish_of(deltas))
        except FrontError as error:
            if not error.retryable or attempt == _NUM_ATTEMPTS:
                return Answer(asked, None, error.code, error.message)
        await asyncio.sleep(pause_s)
        pause_s *= 2
    raise AssertionError("the last attempt returns")


async def _finish_of(deltas: AsyncIterator[TextDelta]) -> TextFinish:
    async for delta in deltas:
        if delta.finish is not None:
            return delta.finish
    raise AssertionError("a generation that does not fail has a finish")


def _plain(answer: Answer) -> str:
    request = answer.asked.request
    text = f"error: {answer.message}" if answer.finish is None else answer.finish.generated_text
    return text if request is None or request.adapter is None else f"[{request.adapter}] {text}"
