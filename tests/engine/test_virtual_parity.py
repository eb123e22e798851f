"""Adapters with virtual tokens in the running engine: each row equals what PEFT computes for it alone, unpadded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from peft_core.forms import AdapterForms, KVPrefix, VirtualTokens
from server.engine.request import AdapterTicket, EngineRequest, SamplingParams
from tests.prompt_adapters import (
    KINDS,
    PREFIXES,
    TASK,
    make_prompt_adapter,
    num_kv_heads,
    oracle_logits,
    oracle_tokens,
    plain_logits,
)
from tests.tiny_engine import (
    Answer,
    Ask,
    TinyEngine,
    assert_equals_logits,
    assert_equals_oracle,
    relative_error,
)
from tests.tiny_models import (
    HEAD_DIM,
    NUM_LAYERS,
    VOCAB,
    load_oracle,
    make_lora,
    make_model,
    random_prompt,
)

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma2", "opt")
P = 21  # more than a chunk, and no multiple of a block
CHUNK = 16


def ask(name: str, prompt: list[int], kind: str, ticket: AdapterTicket, num_tokens: int = 6) -> Ask:
    return Ask(name, prompt, ticket, num_tokens, task_id=TASK if kind == "multitask" else None)


def check(asked: Ask, answer: Answer, kind: str, oracle: Any, num_tokens: int = P) -> None:
    assert_equals_logits(asked, answer, oracle_logits(oracle, kind, num_tokens, asked.prompt, answer.tokens))


class Served:
    """One engine with an adapter of each kind; each is made and loaded once."""

    def __init__(self, model: PreTrainedModel, directory: Path, kinds: tuple[str, ...], **config: Any) -> None:
        self.model = model
        self.paths = {
            kind: make_prompt_adapter(kind, model, directory / kind, num_tokens=P, seed=seed)
            for seed, kind in enumerate(kinds)
        }
        self.engine = TinyEngine(model, directory, chunk_size=CHUNK, **config)
        self.tickets = {kind: self.engine.add(kind, path) for kind, path in self.paths.items()}

    def oracle(self, kind: str) -> Any:
        return load_oracle(self.model, self.paths[kind])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kind_alone_and_beside_base_and_lora_equals_peft(arch: str, tmp_path: Path) -> None:
    model = make_model(arch, seed=1)
    served = Served(model, tmp_path, tuple(KINDS))
    lora = make_lora(model, tmp_path / "lora", seed=9)
    ticket = served.engine.add("lora", lora)
    asks = [ask(f"{kind}-{n}", random_prompt(n, seed=n), kind, served.tickets[kind]) for kind in KINDS for n in (3, 30)]
    others = [Ask("base", random_prompt(20, seed=5), None), Ask("lora", random_prompt(20, seed=5), ticket)]
    answers = served.engine.run([*asks, *others], stagger_steps=1)
    for asked in asks:
        kind = asked.name.rsplit("-", 1)[0]
        oracle = served.oracle(kind)
        check(asked, answers[asked.name], kind, oracle)
        assert answers[asked.name].tokens == oracle_tokens(oracle, kind, P, asked.prompt, 6), asked.name
    assert_equals_oracle(others[0], answers["base"], model)
    assert_equals_oracle(others[1], answers["lora"], load_oracle(model, lora))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_second_request_shares_the_virtual_tokens_blocks(kind: str, tmp_path: Path) -> None:
    served = Served(make_model("llama", seed=1), tmp_path, (kind,))
    first = ask("first", random_prompt(14, seed=1), kind, served.tickets[kind])
    second = ask("second", random_prompt(19, seed=2), kind, served.tickets[kind])
    again = ask("again", [*first.prompt, 5], kind, served.tickets[kind])
    answers: dict[str, Answer] = {}
    tokens_computed = []
    for asked in (first, second, again):
        served.engine.submit(asked)
        answers[asked.name], count = Answer(), 0
        while served.engine.engine.has_work:
            output = served.engine.engine.step()
            count += output.num_tokens
            _take(answers, output)
        tokens_computed.append(count)
        check(asked, answers[asked.name], kind, served.oracle(kind))
    assert tokens_computed == [P + 14 + 5, P - 16 + 19 + 5, P + 15 + 5 - 32], "blocks of 16 are found again"
    assert answers["again"].num_cached_tokens == 32 - P


def _take(answers: dict[str, Answer], output: Any) -> None:
    for delta in output.special:
        answer = answers[delta.request_id]
        answer.tokens += delta.token_ids
        for record in delta.logprobs:
            row = np.full(VOCAB, np.nan)
            row[[token for token, _ in record.top]] = [logprob for _, logprob in record.top]
            answer.rows.append(row)
        answer.num_cached_tokens += delta.num_cached_tokens
        answer.finish = delta.finish or answer.finish


@pytest.mark.parametrize("kind", ["prefix", "multitask"])
def test_preempted_rows_equal_peft(kind: str, tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    unit = 3 * 2 * 16 * 2 * HEAD_DIM * 4
    served = Served(model, tmp_path, (kind,), pool_bytes=28 * unit, max_num_seqs=8)
    asks = [ask(f"r{i}", random_prompt(9 + i, seed=i), kind, served.tickets[kind], 40) for i in range(6)]
    answers = served.engine.run([*asks, Ask("base", random_prompt(20), None, 40)], stagger_steps=2)
    assert served.engine.engine.stats().total_preemptions > 0, "or the test shows nothing"
    oracle = served.oracle(kind)
    for asked in asks:
        check(asked, answers[asked.name], kind, oracle)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_prefix_whose_prompt_begins_at_position_zero(arch: str, tmp_path: Path) -> None:
    """As AdapterHub places it; the plain model with past K/V is the oracle."""
    model = make_model(arch, seed=1)
    generator = torch.Generator().manual_seed(3)
    shape = (NUM_LAYERS, P, num_kv_heads(model), HEAD_DIM)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    forms = {str(first): AdapterForms(prefix=KVPrefix(keys, values, first)) for first in (0, P)}
    asks = [Ask(name, random_prompt(25, seed=4), engine.add_forms(name, one)) for name, one in forms.items()]
    answers = engine.run(asks)
    for asked in asks:
        expected = plain_logits(model, forms[asked.name], asked.prompt, answers[asked.name].tokens)
        assert_equals_logits(asked, answers[asked.name], expected)
    elsewhere = plain_logits(model, forms[str(P)], asks[0].prompt, answers["0"].tokens)
    assert relative_error(answers["0"], elsewhere) > 1e-3, "where the prompt begins matters"


@pytest.mark.parametrize("num_tokens", [5, 40])
def test_virtual_tokens_slide_out_of_a_window(num_tokens: int, tmp_path: Path) -> None:
    """Mistral's windows hold 32 tokens here, in every layer: an answer far enough behind is the base's."""
    model = make_model("mistral", seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    prompt = random_prompt(30, seed=3)
    long_prompt = random_prompt(140, seed=3)
    for kind in ("prefix", "prompt"):
        path = make_prompt_adapter(kind, model, tmp_path / kind, num_tokens=num_tokens, seed=1)
        ticket = engine.add(f"{kind}-{num_tokens}", path)
        asks = [ask("short", prompt, kind, ticket), ask("long", long_prompt, kind, ticket)]
        answers = engine.run(asks)
        for asked in asks:
            check(asked, answers[asked.name], kind, load_oracle(model, path), num_tokens)
        # The prompt's positions are shifted, which rotary embeddings do not see, and nothing else is left.
        base = engine.run([Ask("base", long_prompt)])["base"]
        assert np.abs(answers["long"].logprobs - base.logprobs).max() < 1e-3
        near = engine.run([Ask("base", prompt)])["base"]
        assert np.abs(answers["short"].logprobs[0] - near.logprobs[0]).max() > 0.05


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_virtual_tokens_pass_through_the_replaced_modules(arch: str, tmp_path: Path) -> None:
    model = make_model(arch, seed=1)
    saved = ["norm"] if arch == "llama" else ["ln_1", "lm_head"]
    path = make_prompt_adapter("prompt", model, tmp_path / "a", num_tokens=P, modules_to_save=saved)
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    asked = Ask("a", random_prompt(20, seed=2), engine.add("a", path))
    answers = engine.run([asked, Ask("base", random_prompt(20, seed=2))])
    check(asked, answers["a"], "prompt", load_oracle(model, path))


def test_a_left_padded_batch_of_peft_is_no_reference(tmp_path: Path) -> None:
    """Why every comparison here is unpadded: PEFT counts the pads as positions."""
    model = make_model("llama", seed=1)
    path = make_prompt_adapter("prompt", model, tmp_path / "a", num_tokens=P)
    oracle, prompt = load_oracle(model, path), random_prompt(9, seed=1)
    alone = oracle_logits(oracle, "prompt", P, prompt, [7])
    ids = torch.tensor([[0] * 6 + prompt + [7]])
    mask = torch.tensor([[0] * 6 + [1] * 10])
    with torch.inference_mode():
        padded = oracle(input_ids=ids, attention_mask=mask).logits[0, -2].double().numpy()
    assert np.abs(alone[0] - padded).max() > 0.1


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_prompt_log_probabilities_begin_with_the_prompt(kind: str, tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    served = Served(model, tmp_path, (kind,))
    prompt = random_prompt(12, seed=2)
    params = SamplingParams(2, num_prompt_logprobs=0, ignore_eos=True)
    served.engine.engine.submit(EngineRequest("a", tuple(prompt), params, adapter=served.tickets[kind]))
    told = None
    while served.engine.engine.has_work:
        for delta in served.engine.engine.step().special:
            told = delta.prompt_logprobs or told
    assert told is not None
    assert told[0] is None
    logits = oracle_logits(served.oracle(kind), kind, P, prompt[:1], prompt[1:])
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    for index, record in enumerate(told[1:]):
        assert record is not None
        assert record.token_id == prompt[index + 1]
        assert abs(record.logprob - expected[index, record.token_id]) < 1e-4


def test_penalties_see_the_prompt_and_no_virtual_token(tmp_path: Path) -> None:
    """A token that was penalised once stays so after a preemption, and nothing else is: compared with PEFT's logits."""
    model = make_model("llama", seed=1)
    served = Served(model, tmp_path, ("prompt",))
    prompt = random_prompt(12, seed=2)
    params = SamplingParams(8, repetition_penalty=1.3, presence_penalty=0.5, ignore_eos=True)
    served.engine.engine.submit(EngineRequest("a", tuple(prompt), params, adapter=served.tickets["prompt"]))
    tokens: list[int] = []
    while served.engine.engine.has_work:
        output = served.engine.engine.step()
        tokens += output.token_ids
        for delta in output.special:
            tokens += delta.token_ids
    logits = oracle_logits(served.oracle("prompt"), "prompt", P, prompt, tokens)
    for index, row in enumerate(logits):
        seen = sorted({*prompt, *tokens[:index]})
        row[seen] = np.where(row[seen] < 0, row[seen] * 1.3, row[seen] / 1.3)
        row[sorted(set(tokens[:index]))] -= 0.5
        assert row.max() - row[tokens[index]] < 1e-4


def test_prefixes_of_many_adapters_leave_the_pool_again(tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    unit = 3 * 2 * 16 * 2 * HEAD_DIM * 4
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK, pool_bytes=20 * unit, max_num_seqs=4)
    forms = {kind: _forms(model, kind) for kind in ("prefix", "prompt")}
    for index in range(12):
        kind = ("prefix", "prompt")[index % 2]
        ticket = replace(engine.add_forms(kind, forms[kind]), key=f"digest-{index}")
        engine.run([Ask(f"r{index}", random_prompt(9, seed=index), ticket)])
        assert engine.engine.stats().units_kv == 0
    large = Ask("large", random_prompt(250, seed=1))
    assert_equals_oracle(large, engine.run([large])["large"], model)


def _forms(model: PreTrainedModel, kind: str) -> AdapterForms:
    generator = torch.Generator().manual_seed(1)
    if kind in PREFIXES:
        shape = (NUM_LAYERS, P, num_kv_heads(model), HEAD_DIM)
        return AdapterForms(prefix=KVPrefix(torch.randn(shape, generator=generator), torch.randn(shape), P))
    return AdapterForms(virtual=VirtualTokens(torch.randn((1, P, 64), generator=generator)))
