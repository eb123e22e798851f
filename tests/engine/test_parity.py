"""A row equals HF PEFT on the same base: alone, mixed, chunked, preempted, after a prefix hit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from server.engine.request import AdapterTicket
from tests.tiny_engine import Ask, TinyEngine, assert_equals_oracle, oracle_logits, relative_error
from tests.tiny_models import (
    SERVED_ARCHITECTURES,
    all_targets,
    attention_targets,
    load_oracle,
    make_lora,
    make_model,
    random_prompt,
)

CHUNK = 32
PROMPT_LENGTHS = (3, 9, 31, 32, 33, 64, 90)  # around the chunk's borders, and beyond the tiny models' window

Oracles = dict[str | None, Any]


@pytest.fixture(params=SERVED_ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(arch: str) -> PreTrainedModel:
    return make_model(arch)


def write_adapters(arch: str, model: PreTrainedModel, directory: Path) -> dict[str, Path]:
    """Different ranks, targets, scalings and layers."""
    attention, everything = attention_targets(arch), all_targets(arch)
    first = attention[0].rpartition(".")[2]
    return {
        "small": make_lora(model, directory / "small", rank=2, alpha=3, targets=attention[:1], seed=1),
        "wide": make_lora(model, directory / "wide", rank=24, alpha=8, targets=everything, seed=2, use_rslora=True),
        "patterned": make_lora(
            model,
            directory / "patterned",
            rank=8,
            targets=everything,
            seed=3,
            rank_pattern={first: 3},
            alpha_pattern={first: 5},
        ),
        "upper": make_lora(model, directory / "upper", rank=5, targets=attention, seed=4, layers_to_transform=[1, 2]),
    }


def tickets_and_oracles(
    engine: TinyEngine, arch: str, model: PreTrainedModel, directory: Path
) -> tuple[dict[str | None, AdapterTicket | None], Oracles]:
    tickets: dict[str | None, AdapterTicket | None] = {None: None}
    oracles: Oracles = {None: model}
    for name, path in write_adapters(arch, model, directory).items():
        tickets[name] = engine.add(name, path)
        oracles[name] = load_oracle(model, path)
    return tickets, oracles


def mixed_asks(tickets: dict[str | None, AdapterTicket | None]) -> dict[str, tuple[str | None, Ask]]:
    """Every length once, adapters and base in turn."""
    names = list(tickets)
    asks = {}
    for index, length in enumerate(PROMPT_LENGTHS):
        adapter = names[index % len(names)]
        ask = Ask(f"{adapter}-{length}", random_prompt(length, seed=index), tickets[adapter])
        asks[ask.name] = (adapter, ask)
    return asks


def test_adapters_and_base_mixed_in_chunks_equal_peft(arch: str, model: PreTrainedModel, tmp_path: Path) -> None:
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK)
    tickets, oracles = tickets_and_oracles(engine, arch, model, tmp_path)
    asks = mixed_asks(tickets)

    together = engine.run([ask for _, ask in asks.values()])
    for name, (adapter, ask) in asks.items():
        assert_equals_oracle(ask, together[name], oracles[adapter])

    again = engine.run([ask for _, ask in asks.values()])
    assert again["patterned-32"].num_cached_tokens == 16, "a second run starts from the prefix cache"
    for name, (adapter, ask) in asks.items():
        assert_equals_oracle(ask, again[name], oracles[adapter])

    for name, (adapter, ask) in list(asks.items())[:3]:
        alone = engine.run([ask])
        assert_equals_oracle(ask, alone[name], oracles[adapter])

    _, ask = asks["wide-31"]  # negative control: the comparison sees the wrong adapter
    wrong = oracle_logits(oracles["patterned"], ask.prompt, together["wide-31"].tokens)
    assert relative_error(together["wide-31"], wrong) > 1e-2


def test_a_preempted_sequence_equals_peft(arch: str, model: PreTrainedModel, tmp_path: Path) -> None:
    engine = TinyEngine(model, tmp_path, chunk_size=CHUNK, max_model_len=256)
    unit_bytes = engine.description.unit_bytes
    adapter = make_lora(model, tmp_path / "one", rank=4, targets=attention_targets(arch), seed=5)
    num_adapter_units = -(-engine.add("one", adapter).num_bytes // unit_bytes)
    small = TinyEngine(
        model, tmp_path, chunk_size=CHUNK, max_model_len=128, pool_bytes=(18 + num_adapter_units) * unit_bytes
    )
    ticket = small.add("one", adapter)
    oracle = load_oracle(model, adapter)
    asks = [Ask(f"p{index}", random_prompt(30, seed=index), ticket, num_tokens=60) for index in range(4)]

    answers = small.run(asks)

    assert small.engine.stats().total_preemptions > 0, "the pool is too large to preempt anyone"
    for ask in asks:
        assert_equals_oracle(ask, answers[ask.name], oracle)


def test_one_percent_of_a_scaling_would_be_seen(tmp_path: Path) -> None:
    model = make_model("llama")
    engine = TinyEngine(model, tmp_path)
    path = make_lora(model, tmp_path / "right", rank=4, alpha=100, seed=6)
    ticket = engine.add("right", path)
    ask = Ask("a", random_prompt(12), ticket)
    answer = engine.run([ask])["a"]
    assert_equals_oracle(ask, answer, load_oracle(model, path))

    config = path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 100', '"lora_alpha": 101'))
    wrong = oracle_logits(load_oracle(model, path), ask.prompt, answer.tokens)
    assert relative_error(answer, wrong) > 1e-4
