"""Streams: what events look like, and how a stream ends when something or somebody goes away."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.api.asgi_call import AsgiCall
from tests.api.conftest import Door, Visit


def events(text: str) -> list[dict[str, Any]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_a_stream_has_an_event_a_token_and_the_text_at_the_end(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for path, stream in (("/generate_stream", None), ("/generate", True), ("/", True)):
            parameters = {"max_new_tokens": 3, "details": True}
            answer = await door.generate(path=path, stream=stream, parameters=parameters)
            assert answer.headers["content-type"] == "text/event-stream"
            assert answer.headers["cache-control"] == "no-cache"
            assert answer.headers["x-accel-buffering"] == "no"
            assert "\r" not in answer.text
            assert "[DONE]" not in answer.text
            found = events(answer.text)
            assert [event["index"] for event in found] == [1, 2, 3]
            assert [event["token"]["text"] for event in found] == [" one", " two", " three"]
            assert all(isinstance(event["token"]["logprob"], float) for event in found)
            assert [event["generated_text"] for event in found] == [None, None, " one two three"]
            assert found[0]["details"] is None
            assert found[-1]["details"] == {
                "finish_reason": "length",
                "generated_tokens": 3,
                "prompt_tokens": 3,
                "input_length": 3,
                "seed": None,
            }

    visit(test)


def test_alternatives_travel_with_each_event(visit: Visit) -> None:
    async def test(door: Door) -> None:
        parameters = {"max_new_tokens": 2, "top_n_tokens": 2, "return_k_alternatives": 1}
        found = events((await door.generate(stream=True, parameters=parameters)).text)
        assert [len(event["top_tokens"]) for event in found] == [2, 2]
        assert [len(event["token"]["alternative_tokens"]) for event in found] == [1, 1]

    visit(test)


def test_what_cannot_be_streamed_is_refused(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for parameters in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
            answer = await door.generate(stream=True, parameters=parameters)
            assert answer.status_code == 422
            assert "streamed" in answer.json()["error"]

    visit(test)


def test_a_failure_in_the_middle_is_the_last_event(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate("@fail", stream=True)
        found = events(answer.text)
        assert answer.status_code == 200
        assert len(found) == 3
        assert found[-1] == {"error": "the engine broke in the middle", "error_type": "generation"}
        assert door.front.num_open == 0
        assert door.service.in_house == 0

    visit(test)


def test_a_client_that_leaves_mid_stream_frees_everything(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        call = AsgiCall(door.app, "/generate_stream", {"inputs": "@slow @long", "adapter": "pirate"})
        await call.wait_for_chunks(2)
        assert door.front.num_open == 1
        assert door.front.library.catalog.leases.count("pirate", 1) == 1
        call.leave()
        await call.finish()
        assert door.front.num_open == 0
        assert door.front.library.catalog.leases.count("pirate", 1) == 0
        assert door.service.in_house == 0

    visit(test)


def test_a_client_that_leaves_before_the_answer_frees_everything(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for path in ("/generate", "/generate_stream"):
            call = AsgiCall(door.app, path, {"inputs": "@hang"})
            await asyncio.wait_for(door.front.opened.wait(), 10)
            door.front.opened.clear()
            call.leave()
            await call.finish()
            assert door.front.num_open == 0
            assert door.service.in_house == 0

    visit(test)


def test_silence_is_filled_with_comments(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate("@slow", stream=True, parameters={"max_new_tokens": 4})
        assert ": ping\n\n" in answer.text
        assert len(events(answer.text)) == 4

    visit(test, keep_alive_s=0.005)


def test_a_lively_stream_has_no_comments(visit: Visit) -> None:
    async def test(door: Door) -> None:
        assert ": ping" not in (await door.generate(stream=True)).text

    visit(test)


def test_a_reader_who_takes_nothing_is_dropped(visit: Visit) -> None:
    async def test(door: Door) -> None:
        call = AsgiCall(door.app, "/generate_stream", {"inputs": "@long"})
        await call.wait_for_chunks(1)
        call.stalled = True
        await call.finish()
        assert door.front.num_open == 0
        assert door.service.in_house == 0

    visit(test, stalled_client_s=0.1)


def test_a_slow_reader_is_not_dropped(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate("@slow", stream=True)
        assert len(events(answer.text)) == 10

    visit(test, stalled_client_s=0.1)


def test_a_client_that_is_gone_before_the_first_event_frees_everything(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for _ in range(20):
            call = AsgiCall(door.app, "/generate_stream", {"inputs": "@long"})
            await asyncio.wait_for(door.front.opened.wait(), 10)
            door.front.opened.clear()
            call.leave()
            await call.finish()
            assert door.front.num_open == 0
            assert door.service.in_house == 0

    visit(test)
