"""The native routes: shapes, parameters, and what is refused, over a front without an engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.conftest import Door, Visit


def test_an_answer_is_an_object_and_at_the_root_an_array_of_one(visit: Visit) -> None:
    async def test(door: Door) -> None:
        plain = await door.generate()
        assert plain.status_code == 200
        assert plain.json() == {"generated_text": " one two three four five six seven eight nine ten"}
        assert (await door.generate(path="/")).json() == [plain.json()]

    visit(test)


def test_explicit_nulls_mean_not_given(visit: Visit) -> None:
    async def test(door: Door) -> None:
        names = ["adapter_id", "adapter_source", "merged_adapters", "api_token", "max_new_tokens", "temperature"]
        names += ["seed", "truncate", "best_of", "top_n_tokens", "return_k_alternatives", "grammar", "details"]
        answer = await door.generate(adapter=None, stream=None, parameters={**dict.fromkeys(names), "stop": []})
        assert answer.status_code == 200, answer.text
        assert (await door.generate(parameters=None)).status_code == 200

    visit(test)


def test_details_tell_tokens_logprobs_and_alternatives(visit: Visit) -> None:
    async def test(door: Door) -> None:
        parameters = {"max_new_tokens": 2, "details": True, "decoder_input_details": True}
        parameters |= {"top_n_tokens": 2, "return_k_alternatives": 1}
        details = (await door.generate("a b", parameters=parameters)).json()["details"]
        assert details["finish_reason"] == "length"
        assert (details["generated_tokens"], details["prompt_tokens"], details["seed"]) == (2, 2, None)
        assert [token["logprob"] is None for token in details["prefill"]] == [True, False]
        assert [token["text"] for token in details["tokens"]] == [" one", " two"]
        assert all(isinstance(token["logprob"], float) for token in details["tokens"])
        assert [len(token["alternative_tokens"]) for token in details["tokens"]] == [1, 1]
        assert [len(top) for top in details["top_tokens"]] == [2, 2]
        assert set(details["top_tokens"][0][0]) == {"id", "text", "logprob", "special"}

    visit(test)


def test_details_are_absent_unless_asked_for(visit: Visit) -> None:
    async def test(door: Door) -> None:
        assert set((await door.generate(parameters={"top_n_tokens": 2})).json()) == {"generated_text"}

    visit(test)


def test_best_of_answers_with_the_likeliest_and_tells_the_others(visit: Visit) -> None:
    async def test(door: Door) -> None:
        parameters = {"best_of": 3, "do_sample": True, "details": True, "max_new_tokens": 4}
        details = (await door.generate(parameters=parameters)).json()["details"]
        others = details["best_of_sequences"]
        assert len(others) == 2

        def mean(sequence: dict[str, Any]) -> float:
            return float(sum(token["logprob"] for token in sequence["tokens"]))

        assert all(mean(details) >= mean(other) for other in others)
        assert len({details["seed"], *(other["seed"] for other in others)}) == 3

    visit(test)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0, "do_sample": True}, 0.0),
        ({"top_k": 5}, 1.0),
        ({"top_k": 0, "top_p": 1.0}, 0.0),
        ({"top_p": 0.9}, 1.0),
        ({"typical_p": 0.9}, 1.0),
        ({"min_p": 0.1}, 1.0),
    ],
)
def test_sampling_is_on_when_asked_for_or_when_a_knob_is_turned(
    visit: Visit, parameters: dict[str, Any], expected: float
) -> None:
    async def test(door: Door) -> None:
        assert (await door.generate(parameters=parameters)).status_code == 200
        assert door.front.requests[-1].params.temperature == expected

    visit(test)


def test_all_samplers_reach_the_engine(visit: Visit) -> None:
    async def test(door: Door) -> None:
        given = {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.7, "seed": 11}
        given |= {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2, "min_new_tokens": 2}
        more = {"max_new_tokens": 5, "stop_token_ids": [4], "ignore_eos_token": True, "truncate": 9, "stop": ["x"]}
        await door.generate(parameters={**given, **more, "return_full_text": True})
        asked = door.front.requests[-1]
        assert {name: getattr(asked.params, name) for name in given} == given
        assert (asked.params.max_new_tokens, asked.params.stop_token_ids, asked.params.ignore_eos) == (5, (4,), True)
        assert (asked.truncate, asked.stop, asked.echo, asked.include_stop) == (9, ("x",), True, True)
        assert asked.fit_length is False
        assert asked.deadline_s == door.settings.request_timeout_s

    visit(test)


def test_without_a_length_the_answer_may_fill_the_model(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.generate()
        assert door.front.requests[-1].fit_length

    visit(test)


def test_a_stop_string_ends_the_answer_and_stays_in_it(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate(parameters={"stop": ["three"], "details": True})
        assert answer.json()["generated_text"] == " one two three"
        assert answer.json()["details"]["finish_reason"] == "stop_sequence"

    visit(test)


def test_the_adapter_may_stand_in_three_places_if_they_agree(visit: Visit) -> None:
    async def test(door: Door) -> None:
        assert (await door.upload("pirate")).status_code == 201
        for body in (
            {"adapter": "pirate"},
            {"adapter_id": "pirate"},
            {"parameters": {"adapter_id": "pirate"}},
            {"adapter": "pirate@1", "parameters": {"adapter_id": "pirate@1"}},
            {"adapter": "pirate", "adapter_id": ""},
        ):
            answer = await door.generate(**body)
            assert answer.json()["generated_text"].startswith(" arr")
            assert (answer.headers["x-adapter-id"], answer.headers["x-adapter-version"]) == ("pirate", "1")
        clash = await door.generate(adapter="pirate", parameters={"adapter_id": "sql"})
        assert clash.status_code == 422
        assert "'pirate'" in clash.json()["error"]
        assert "'sql'" in clash.json()["error"]

    visit(test)


@pytest.mark.parametrize("name", ["", "__base_model__", None])
def test_some_names_mean_the_base(visit: Visit, name: str | None) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate(adapter=name)
        assert answer.status_code == 200
        assert "x-adapter-id" not in answer.headers
        assert answer.headers["x-model-id"] == "veneer-demo-base"

    visit(test)


def test_headers_tell_counts_and_times_of_an_answer(visit: Visit) -> None:
    async def test(door: Door) -> None:
        headers = (await door.generate("a b c", parameters={"max_new_tokens": 4})).headers
        for name, value in (("prompt-tokens", "3"), ("generated-tokens", "4"), ("total-tokens", "7")):
            assert headers[f"x-{name}"] == value
        assert headers["x-compute-characters"] == "5"
        for name in ("total-time", "queue-time", "inference-time", "time-per-token", "validation-time"):
            assert int(headers[f"x-{name}"]) >= 0
        assert float(headers["x-compute-time"]) > 0

    visit(test)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"watermark": True}, "watermark"),
        ({"merged_adapters": {"ids": ["a"]}}, "merged_adapters"),
        ({"grammar": {"type": "json"}}, "grammar"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"adapter_source": "hub"}, "adapter_source"),
        ({"api_token": "hf_x"}, "api_token"),
        ({"best_of": 2}, "needs sampling"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"best_of": 99, "do_sample": True}, "--max-best-of"),
        ({"stop": ["x"] * 99}, "--max-stop-sequences"),
        ({"stop": [""]}, "empty stop string"),
        ({"top_n_tokens": 999}, "--max-top-n-tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**9}, "1000000003; the model takes 512 tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"truncate": 0}, "truncate"),
        ({"stop": "one string"}, "stop"),
        ({"details": "yes"}, "details"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(visit: Visit, parameters: dict[str, Any], words: str) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate("a b c", parameters=parameters)
        assert answer.status_code == 422
        assert answer.json()["error_type"] == "validation"
        assert words in answer.json()["error"]
        assert door.front.num_open == 0

    visit(test)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the body"),
        (b"{", "not JSON"),
        (b"[]", "the body"),
        (b"\xff\xfe", "body"),
        (b'{"inputs": ""}', "`inputs`"),
        (b'{"inputs": null}', "`inputs`"),
        (b'{"inputs": ["a"]}', "`inputs`"),
        (b'{"parameters": {}}', "`inputs`"),
        (b'{"inputs": "\\ud800"}', "surrogate"),
        (b'{"inputs": "a", "parameters": {"temperature": NaN}}', "temperature"),
        (b'{"inputs": "a", "parameters": {"temperature": 1e999}}', "temperature"),
        (b'{"inputs": "a", "adapter": "\\ud800"}', "surrogate"),
        (b'{"inputs": "a", "adapter": "../../etc/passwd"}', "no adapter name"),
        (b'{"inputs": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "body"),
        (b'{"inputs": "a", "parameters": {"seed": ' + b"9" * 5000 + b"}}", "body"),
    ],
)
def test_a_broken_body_is_told_what_is_wrong(visit: Visit, content: bytes, words: str) -> None:
    async def test(door: Door) -> None:
        answer = await door.client.post("/generate", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert set(answer.json()) == {"error", "error_type"}
        assert words in answer.json()["error"]
        assert len(answer.text) < 3000

    visit(test)


def test_json_must_be_called_json(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.client.post("/generate", content=b'{"inputs": "a"}')
        assert answer.status_code == 422
        assert "Content-Type: application/json" in answer.json()["error"]

    visit(test)


def test_a_body_over_the_cap_is_413(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate("a" * 2000)
        assert (answer.status_code, answer.json()["error_type"]) == (413, "too_large")

    visit(test, max_body_bytes=1000)


def test_a_small_body_cannot_cause_a_large_error(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate(parameters={"stop": [1] * 4000})
        assert answer.status_code == 422
        assert len(answer.content) < 2500

    visit(test)


@pytest.mark.parametrize(
    ("prompt", "status", "error_type"),
    [
        ("@early", 424, "generation"),
        ("@late", 504, "timeout"),
        ("@gone", 503, "loading"),
        ("@bug", 500, "incomplete_generation"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_a_real_status(
    visit: Visit, prompt: str, status: int, error_type: str, stream: bool
) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate(prompt, stream=stream)
        assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
        assert "a bug" not in answer.text
        assert answer.headers["x-request-id"]
        assert door.front.num_open == 0

    visit(test)


def test_an_unknown_adapter_is_404_with_near_names(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.upload("pirate")
        near = await door.generate(adapter="pirat")
        assert (near.status_code, near.json()["error_type"]) == (404, "adapter_not_found")
        assert "'pirate'" in near.json()["error"]
        assert "mean" not in (await door.generate(adapter="zzz")).json()["error"]
        assert (await door.generate(adapter="pirate@7")).status_code == 404
        assert (await door.generate(adapter="pirate@prod")).status_code == 404

    visit(test)


def test_a_full_queue_is_429_with_retry_after(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate()
        assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "2"

    visit(test, max_open=0)


def test_error_bodies_never_repeat_half_characters(visit: Visit) -> None:
    async def test(door: Door) -> None:
        content = json.dumps({"inputs": "a", "ad\ud800apter": 1}).encode()
        answer = await door.client.post("/generate", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert answer.json()["error"]

    visit(test)


def test_refusals_of_a_whole_request_say_what_to_do(visit: Visit) -> None:
    async def test(door: Door) -> None:
        empty = await door.generate("")
        assert (empty.status_code, "the prompt is empty" in empty.json()["error"]) == (422, True)
        wrong = await door.client.put("/generate", json={"inputs": "x"})
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json() == {
            "error": "PUT is no method of /generate; it takes POST",
            "error_type": "method_not_allowed",
        }

    visit(test)
