"""Offline runs: every prompt gets its answer or its error, in order, in bounded memory."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from server.engine.request import SamplingParams
from server.offline import Totals, generate_into
from server.offline_input import Asked, Defaults, from_json_lines, from_prompts, from_text
from tests.front.test_front import House, house, run, until

DEFAULTS = Defaults(SamplingParams(5, ignore_eos=True), seed=0, adapters=("sql", "broken"))


async def told(at: House, asked: Iterator[Asked], **options: Any) -> tuple[Totals, list[dict[str, Any]]]:
    out = io.StringIO()
    options = {"as_json": True, "max_in_flight": 8, **options}
    totals = await generate_into(out, at.front, asked, **options)
    return totals, [json.loads(line) for line in out.getvalue().splitlines()]


def test_every_line_gets_an_answer_or_its_own_error_in_its_place() -> None:
    lines = [
        '{"prompt": "A", "adapter": "sql", "id": "first"}',
        "",
        '{"prompt": "A", "adapter": "broken"}',
        '{"prompt": "A", "adapter": "nobody"}',
        '{"prompt": "A"}',
        '{"prompt": "A", "adapter": null, "max_new_tokens": 2, "stop": ["C"], "seed": 9}',
        '{"promt": "A"}',
        "[1]",
        "{",
        '{"prompt": [65, 66], "adapter": null, "max_new_tokens": 1}',
        '{"prompt": "", "adapter": null}',
        '{"prompt": "A", "adapter": null, "max_new_tokens": "3"}',
    ]

    async def scene() -> None:
        async with house() as at:
            totals, answers = await told(at, from_json_lines(lines, DEFAULTS))
            assert [answer["index"] for answer in answers] == list(range(11))
            assert (totals.num_done, totals.num_failed) == (11, 8)
            assert answers[0] == {
                "index": 0,
                "id": "first",
                "adapter": "sql",
                "text": "BCDEF",
                "finish_reason": "length",
                "prompt_tokens": 1,
                "generated_tokens": 5,
                "seed": 0,
            }
            errors = {answer["index"]: answer["error"]["message"] for answer in answers if "error" in answer}
            for index, words in (
                *((1, "truncated"), (2, "unknown adapter 'nobody'"), (3, "has several: sql, broken")),
                *((5, "unknown field 'promt'"), (6, "not list"), (7, "Expecting"), (9, "empty"), (10, "'3'")),
            ):
                assert words in errors[index]
            assert (answers[4]["text"], answers[4]["finish_reason"], answers[4]["seed"]) == ("BC", "stop_sequence", 9)
            assert answers[8]["text"] == "C"

    run(scene())


def test_each_prompt_runs_on_every_adapter_of_the_run() -> None:
    prompts = list(from_prompts(["x", "y"], DEFAULTS))
    asked = [(one.request.prompt, one.request.adapter) for one in prompts if one.request is not None]
    assert asked == [("x", "sql"), ("x", "broken"), ("y", "sql"), ("y", "broken")]
    bare = Defaults(SamplingParams(5))
    texts = [one.request for one in from_text(["a\n", "\n", "b"], bare)]
    assert [(text.prompt, text.adapter) for text in texts if text is not None] == [("a", None), ("b", None)]


@pytest.mark.parametrize("ordered", [True, False])
def test_order_is_kept_unless_it_is_not_wanted(ordered: bool) -> None:
    lines = [json.dumps({"prompt": "A", "adapter": None, "max_new_tokens": 60 - index}) for index in range(50)]

    async def scene() -> None:
        async with house("fake step_ms=1") as at:
            _, answers = await told(at, from_json_lines(lines, DEFAULTS), ordered=ordered)
            order = [answer["index"] for answer in answers]
            assert sorted(order) == list(range(50))
            assert (order == list(range(50))) == ordered

    run(scene())


def test_a_long_input_is_read_no_further_than_needed() -> None:
    num_read, most_in_flight = 0, 0

    def endless() -> Iterator[str]:
        nonlocal num_read
        while True:
            num_read += 1
            yield '{"prompt": "A", "adapter": null}'

    async def scene() -> None:
        async with house("fake step_ms=1") as at:

            class Watcher:
                def on_answer(self, num_done: int, num_failed: int, num_tokens: int) -> None:
                    nonlocal most_in_flight
                    most_in_flight = max(most_in_flight, at.front.engine.num_in_flight)
                    assert num_read <= num_done + 8 + 70
                    if num_done == 200:
                        raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                await told(at, from_json_lines(endless(), DEFAULTS), watcher=Watcher())
            assert most_in_flight <= 8
            assert num_read < 300

    run(scene())


def test_an_answer_is_told_while_the_input_is_still_open() -> None:
    async def scene() -> None:
        async with house() as at:
            reading, writing = os.pipe()
            out = io.StringIO()
            source = os.fdopen(reading, encoding="utf-8")
            asked = from_json_lines(source, DEFAULTS)
            task = asyncio.create_task(generate_into(out, at.front, asked, as_json=False, max_in_flight=4))
            os.write(writing, b'{"prompt": "A", "adapter": "sql"}\n')
            await until(lambda: bool(out.getvalue()))
            assert out.getvalue() == "[sql] BCDEF\n"
            assert not task.done()
            os.close(writing)
            assert (await task).num_done == 1
            source.close()
            await until(lambda: not [thread for thread in threading.enumerate() if thread.name == "input"])

    run(scene())


def test_prompts_of_a_dead_engine_are_tried_again() -> None:
    lines = [json.dumps({"prompt": "A", "adapter": None, "max_new_tokens": 40})] * 6

    async def scene() -> None:
        async with house("fake step_ms=5", is_process=True) as at:
            running = asyncio.create_task(told(at, from_json_lines(lines, DEFAULTS)))
            await until(lambda: at.front.engine.num_in_flight == 6)
            at.kill_engine()
            totals, answers = await running
            assert (totals.num_done, totals.num_failed) == (6, 0)
            assert {answer["generated_tokens"] for answer in answers} == {40}
            assert at.front.engine.num_restarts == 1

    run(scene())
