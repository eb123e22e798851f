"""Adapters that act from their invocation on (aLoRA): each row equals what PEFT computes for it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from server.engine.request import AdapterTicket, EngineRequest, SamplingParams
from tests.tiny_engine import (
    Answer,
    Ask,
    TinyEngine,
    assert_equals_oracle,
    oracle_logits,
    relative_error,
)
from tests.tiny_models import (
    HEAD_DIM,
    VOCAB,
    all_targets,
    attention_targets,
    load_oracle,
    make_lora,
    make_model,
    random_prompt,
)

CHUNK = 16
INVOCATION = [17, 4, 99]


def make_invoked(
    model: PreTrainedModel, arch: str, directory: Path, *, invocation: list[int] | None = None, seed: int = 0
) -> Path:
    targets = attention_targets(arch) if arch == "opt" else all_targets(arch)  # PEFT fails on rows that OPT flattens
    tokens = INVOCATION if invocation is None else invocation
    return make_lora(model, directory, targets=targets, seed=seed, alora_invocation_tokens=tokens)


def prompt_with(places: list[int], length: int, *, seed: int = 0) -> list[int]:
    """A random prompt that holds the invocation at these places and nowhere else."""
    prompt = [token if token != INVOCATION[0] else 18 for token in random_prompt(length, seed=seed)]
    for place in places:
        prompt[place : place + len(INVOCATION)] = INVOCATION
    return prompt


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gemma2", "opt"])
def test_wherever_the_invocation_stands_the_answer_is_pefts(arch: str, tmp_path: Path) -> None:
    """At the beginning, around the borders of chunks and blocks, twice, at the end; beside base and LoRA."""
    model = make_model(arch, seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    path, lora = make_invoked(model, arch, tmp_path / "a", seed=2), make_lora(model, tmp_path / "lora", seed=3)
    ticket, lora_ticket = engine.add("a", path), engine.add("lora", lora)
    places = [[0], [3], [13], [14], [15], [16], [31], [2, 20], [5, 40], [45]]
    asks = [Ask(f"at {one}", prompt_with(one, 48, seed=i), ticket) for i, one in enumerate(places)]
    short = Ask("short", prompt_with([2], 5), ticket)
    others = [Ask("base", prompt_with([7], 30)), Ask("lora", prompt_with([7], 30), lora_ticket)]
    answers = engine.run([*asks, short, *others], stagger_steps=1)
    oracle = load_oracle(model, path)
    for asked in (*asks, short):
        assert_equals_oracle(asked, answers[asked.name], oracle)
    assert_equals_oracle(others[0], answers["base"], model)
    assert_equals_oracle(others[1], answers["lora"], load_oracle(model, lora))


def test_before_the_invocation_and_after_the_first_it_is_the_base(tmp_path: Path) -> None:
    """Negative control: an adapter that acts from the first occurrence, or from the beginning, answers otherwise."""
    model = make_model("llama", seed=1)
    path = make_invoked(model, "llama", tmp_path / "a")
    always = make_lora(model, tmp_path / "always", targets=all_targets("llama"))
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    asked = Ask("a", prompt_with([3, 30], 40), engine.add("a", path))
    answer = engine.run([asked])["a"]
    early = Ask("b", prompt_with([3], 40), asked.adapter)
    assert relative_error(answer, oracle_logits(load_oracle(model, always), asked.prompt, answer.tokens)) > 1e-3
    assert relative_error(answer, oracle_logits(model, asked.prompt, answer.tokens)) > 1e-3
    assert np.abs(engine.run([early])["b"].logprobs[0] - answer.logprobs[0]).max() > 1e-3


def test_without_its_invocation_it_is_the_base_to_the_bit(tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    ticket = engine.add("a", make_invoked(model, "llama", tmp_path / "a"))
    prompt = prompt_with([], 40)
    answers = engine.run([Ask("a", prompt, ticket), Ask("base", prompt)])
    assert np.array_equal(answers["a"].logprobs, answers["base"].logprobs)


def test_blocks_before_the_invocation_are_the_bases_and_those_after_are_its_own(tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    paths = [make_invoked(model, "llama", tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    tickets = [engine.add(path.name, path) for path in paths]
    prompt = prompt_with([38], 60)  # in the third block of 16
    cached = {}
    for name, adapter in (("base", None), ("one", tickets[0]), ("two", tickets[1]), ("again", tickets[0])):
        asked = Ask(name, prompt, adapter)
        answer = engine.run([asked])[name]
        oracle: Any = model if adapter is None else load_oracle(model, paths[tickets.index(adapter)])
        assert_equals_oracle(asked, answer, oracle)
        cached[name] = answer.num_cached_tokens
    assert cached == {"base": 0, "one": 32, "two": 32, "again": 48}


def test_the_base_takes_over_what_an_invoked_request_computed_before(tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    ticket = engine.add("a", make_invoked(model, "llama", tmp_path / "a"))
    prompt = prompt_with([38], 60)
    engine.run([Ask("a", prompt, ticket)])
    asked = Ask("base", prompt)
    answer = engine.run([asked])["base"]
    assert answer.num_cached_tokens == 32
    assert_equals_oracle(asked, answer, model)


def test_preempted_rows_go_on_from_where_they_were_invoked(tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    unit = 3 * 2 * 16 * 2 * HEAD_DIM * 4
    path = make_invoked(model, "llama", tmp_path / "a")
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK, pool_bytes=30 * unit, max_num_seqs=8)
    ticket = engine.add("a", path)
    asks = [Ask(f"r{i}", prompt_with([5 * i], 30, seed=i), ticket, 40) for i in range(5)]
    answers = engine.run([*asks, Ask("base", prompt_with([3], 30), None, 40)], stagger_steps=2)
    assert engine.engine.stats().total_preemptions > 0, "or the test shows nothing"
    for asked in asks:
        assert_equals_oracle(asked, answers[asked.name], load_oracle(model, path))


def test_what_it_generates_invokes_nothing(tmp_path: Path) -> None:
    """Every generated token is made to be the invocation; the rows stay the base's."""
    model = make_model("llama", seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    ticket = engine.add("a", make_invoked(model, "llama", tmp_path / "a", invocation=[200]))
    prompt = [token for token in random_prompt(20) if token != 200]
    params = SamplingParams(8, logit_bias=((200, 1e4),), num_logprobs=VOCAB, ignore_eos=True)
    answer = _answer(engine, EngineRequest("a", tuple(prompt), params, adapter=ticket))
    assert answer.tokens == [200] * 8
    assert relative_error(answer, oracle_logits(model, prompt, answer.tokens)) < 1e-5


def test_log_probabilities_of_the_prompt_change_where_the_adapter_begins(tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    path = make_invoked(model, "llama", tmp_path / "a")
    prompt = prompt_with([21], 40)
    told = _prompt_logprobs(engine, prompt, engine.add("a", path))
    adapted = oracle_logits(load_oracle(model, path), prompt[:1], prompt[1:])
    expected = adapted - np.logaddexp.reduce(adapted, axis=-1, keepdims=True)
    base = oracle_logits(model, prompt[:1], prompt[1:])
    base -= np.logaddexp.reduce(base, axis=-1, keepdims=True)
    targets = np.arange(39), prompt[1:]
    assert np.abs(told - expected[targets]).max() < 1e-4
    assert np.abs(told - base[targets])[:21].max() < 1e-4
    assert np.abs(told - base[targets])[21:].max() > 1e-2


def _prompt_logprobs(engine: TinyEngine, prompt: list[int], ticket: AdapterTicket) -> Any:
    params = SamplingParams(1, num_prompt_logprobs=0, ignore_eos=True)
    engine.engine.submit(EngineRequest("a", tuple(prompt), params, adapter=ticket))
    while engine.engine.has_work:
        for delta in engine.engine.step().special:
            if delta.prompt_logprobs is not None:
                return np.array([record.logprob for record in delta.prompt_logprobs[1:] if record is not None])
    raise AssertionError("nothing was told")


def _answer(engine: TinyEngine, request: EngineRequest) -> Answer:
    answers = {request.request_id: Answer()}
    engine.engine.submit(request)
    while engine.engine.has_work:
        engine.step_into(answers)
    return answers[request.request_id]
