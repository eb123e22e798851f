"""Every form in the running engine against the same form on the plain model by hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from peft_core.forms import AdapterForms, VirtualTokens
from tests.plain_forms import applied
from tests.random_forms import RandomForms
from tests.tiny_engine import Answer, Ask, TinyEngine, assert_equals_oracle, oracle_logits, relative_error
from tests.tiny_models import SERVED_ARCHITECTURES, make_model, random_prompt

QUICK = ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "opt", "mixtral")
ARCHITECTURES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SERVED_ARCHITECTURES]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_forms_mixed_in_one_batch_equal_the_plain_model(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture, seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=16)
    forms = RandomForms(engine.spec, seed=2).every()
    tickets = {name: engine.add_forms(name, one) for name, one in forms.items()}
    lengths = (1, 5, 23, 40)
    asks = [
        Ask(f"{name}-{length}", random_prompt(length, seed=length), ticket)
        for name, ticket in tickets.items()
        for length in lengths[: 2 + 2 * (name in ("gain", "bottleneck", "tables"))]
    ]
    asks += [Ask(f"base-{length}", random_prompt(length, seed=length)) for length in lengths]
    answers = engine.run(asks, stagger_steps=1)
    for ask in asks:
        check(model, engine, ask, answers[ask.name], forms.get(ask.name.rpartition("-")[0], AdapterForms()))


def check(model: torch.nn.Module, engine: TinyEngine, ask: Ask, answer: Answer, forms: AdapterForms) -> None:
    with applied(model, forms, engine.spec) as oracle:
        assert_equals_oracle(ask, answer, oracle)


def test_the_comparison_sees_every_form(tmp_path: Path) -> None:
    """Negative control: the base's answer is not within tolerance of any of the forms."""
    model = make_model("llama", seed=1)
    engine = TinyEngine(model, tmp_path)
    ask = Ask("base", random_prompt(30, seed=3))
    answer = engine.run([ask])["base"]
    for name, forms in RandomForms(engine.spec, seed=2).every().items():
        with applied(model, forms, engine.spec) as oracle:
            assert relative_error(answer, oracle_logits(oracle, ask.prompt, answer.tokens)) > 1e-2, name


def test_a_row_has_the_same_bits_alone_and_in_company(tmp_path: Path) -> None:
    model = make_model("qwen2", seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=16)
    forms = RandomForms(engine.spec, seed=2).every()
    tickets = {name: engine.add_forms(name, one) for name, one in forms.items()}
    asks = [Ask(name, random_prompt(19, seed=index), ticket) for index, (name, ticket) in enumerate(tickets.items())]
    alone = {ask.name: engine.run([ask])[ask.name] for ask in asks}
    twins = [Ask(f"{ask.name}-twin", random_prompt(7, seed=index), ask.adapter) for index, ask in enumerate(asks)]
    crowd = TinyEngine(model, tmp_path, chunk_size=16).run([*asks, *twins], stagger_steps=1)
    for ask in asks:
        assert crowd[ask.name].tokens == alone[ask.name].tokens
        assert (crowd[ask.name].logprobs == alone[ask.name].logprobs).all(), ask.name


def test_a_step_of_low_rank_adapters_has_no_hook(tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    engine = TinyEngine(model, tmp_path)
    random = RandomForms(engine.spec, seed=2)
    norms, lora = engine.add_forms("norms", random.norms()), engine.add_forms("lora", random.lora())
    hooks = cast(Any, engine.engine)._runner.active.hooks
    engine.run([Ask("norms", random_prompt(5, seed=1), norms)])
    assert hooks.num_installed
    engine.run([Ask("lora", random_prompt(5, seed=1), lora)])
    assert not hooks.num_installed


def test_a_decode_step_of_virtual_tokens_has_no_hook(tmp_path: Path) -> None:
    """Their rows and their keys and values are needed while they are computed, and never again."""
    engine = TinyEngine(make_model("llama", seed=1), tmp_path)
    random = RandomForms(engine.spec, seed=2)
    ticket = engine.add_forms("virtual", AdapterForms(virtual=VirtualTokens(random.normal(1, 5, 64))))
    hooks = cast(Any, engine.engine)._runner.active.hooks
    installed: list[int] = []
    answers = {"a": Answer()}
    engine.submit(Ask("a", random_prompt(5, seed=1), ticket))
    while engine.engine.has_work:
        engine.step_into(answers)
        installed.append(hooks.num_installed)
    assert max(installed) == 2
    assert installed[-3:] == [0, 0, 0]
