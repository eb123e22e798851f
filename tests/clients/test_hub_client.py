"""`huggingface_hub.InferenceClient.text_generation`, unmodified, against a running server."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, TextGenerationError, UnknownError, ValidationError

from tests.clients.running import RunningServer

PROMPT = "once upon"


@pytest.fixture(params=["", "/generate"], ids=["root", "generate"])
def client(server: RunningServer, request: pytest.FixtureRequest) -> InferenceClient:
    return InferenceClient(model=server.url + request.param, timeout=60)


def test_it_gets_a_text(client: InferenceClient) -> None:
    text = client.text_generation(PROMPT, max_new_tokens=6)
    assert isinstance(text, str)
    assert text == client.text_generation(PROMPT, max_new_tokens=6), "greedy is the same each time"
    assert client.text_generation(PROMPT, max_new_tokens=6, return_full_text=True) == PROMPT + text


def test_it_gets_the_adapter_that_it_names(client: InferenceClient) -> None:
    answers = {
        name: client.text_generation(PROMPT, max_new_tokens=8, adapter_id=name)
        for name in (None, "poet", "sql", "sql@1")
    }
    assert len({answers[None], answers["poet"], answers["sql"]}) == 3
    assert answers["sql"] == answers["sql@1"]


def test_it_gets_details(client: InferenceClient) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=5, details=True, decoder_input_details=True, adapter_id="poet", top_n_tokens=3
    )
    assert answer.details is not None
    assert answer.details.finish_reason == "length"
    assert (answer.details.generated_tokens, len(answer.details.tokens)) == (5, 5)
    assert len(answer.details.prefill) == len(PROMPT)
    assert answer.details.top_tokens is not None
    assert [len(top) for top in answer.details.top_tokens] == [3] * 5
    for token, top in zip(answer.details.tokens, answer.details.top_tokens, strict=True):
        best: Any = top[0]
        assert (token.id, token.logprob) == (best["id"], best["logprob"]), "greedy takes the likeliest"


def test_it_gets_a_stream_that_says_what_the_answer_says(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=8, adapter_id="sql")
    pieces = list(client.text_generation(PROMPT, max_new_tokens=8, adapter_id="sql", stream=True))
    assert "".join(pieces) == whole
    events = list(client.text_generation(PROMPT, max_new_tokens=8, adapter_id="sql", stream=True, details=True))
    assert [event.index for event in events] == list(range(1, 9))
    assert events[-1].generated_text == whole
    assert events[-1].details is not None
    assert events[-1].details.generated_tokens == 8


def test_its_sampling_is_repeated_by_the_seed(client: InferenceClient) -> None:
    def sample(seed: int | None) -> str:
        return str(client.text_generation(PROMPT, max_new_tokens=12, do_sample=True, temperature=2.0, seed=seed))

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_it_sees_the_errors_that_it_knows(client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="1000000"):
        client.text_generation(PROMPT, max_new_tokens=10**6)
    with pytest.raises(UnknownError, match="nobody"):
        client.text_generation(PROMPT, adapter_id="nobody")
    with pytest.raises(ValidationError, match="streamed"):
        client.text_generation(PROMPT, stream=True, decoder_input_details=True, details=True)
    for error in (GenerationError, OverloadedError):
        assert issubclass(error, TextGenerationError)


def test_a_stop_string_ends_its_answer(client: InferenceClient) -> None:
    text = client.text_generation(PROMPT, max_new_tokens=8)
    answer = client.text_generation(PROMPT, max_new_tokens=8, stop=[text[2:4]], details=True)
    assert answer.details is not None
    assert answer.details.finish_reason == "stop_sequence"
    assert answer.generated_text == text[: text.index(text[2:4]) + 2]
