"""On CPU a row has the same bits in any company: alone, in a crowd, beside other adapters, at another place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from server.engine.request import AdapterTicket
from tests.tiny_engine import Answer, Ask, TinyEngine
from tests.tiny_models import make_lora, make_model, random_prompt

RANKS = (2, 8, 16, 40)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def num_threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def crowd(tickets: list[AdapterTicket | None], size: int) -> list[Ask]:
    lengths = np.random.default_rng(7).integers(2, 120, size)
    return [
        Ask(f"n{index}", random_prompt(int(length), seed=100 + index), tickets[index % len(tickets)], num_tokens=9)
        for index, length in enumerate(lengths)
    ]


def assert_same_bits(one: Answer, other: Answer) -> None:
    assert one.tokens == other.tokens
    assert np.array_equal(one.logprobs, other.logprobs)


def test_a_row_is_bit_equal_in_any_company(dtype: str, num_threads: int, tmp_path: Path) -> None:
    model = make_model("qwen2")
    engine = TinyEngine(
        model, tmp_path, dtype=dtype, num_threads=num_threads, chunk_size=32, enable_prefix_caching=False
    )
    tickets: list[AdapterTicket | None] = [None]
    for index, rank in enumerate(RANKS):
        tickets.append(engine.add(f"r{rank}", make_lora(model, tmp_path / f"r{rank}", rank=rank, seed=index)))
    mine = [Ask(f"mine{index}", random_prompt(45, seed=index), ticket, 9) for index, ticket in enumerate(tickets)]
    alone = {ask.name: engine.run([ask])[ask.name] for ask in mine}

    for size, stagger_steps in ((2, 0), (19, 0), (11, 1), (6, 3)):
        others = crowd(tickets, size)
        answers = engine.run([*others[: size // 2], *mine, *others[size // 2 :]], stagger_steps=stagger_steps)
        for ask in mine:
            assert_same_bits(alone[ask.name], answers[ask.name])

    changed = engine.run([Ask("mine1", mine[1].prompt, tickets[2], 9)])["mine1"]  # negative control
    assert not np.array_equal(alone["mine1"].logprobs, changed.logprobs)
    torch.set_num_threads(1)


def test_a_float32_adapter_on_a_bfloat16_base_adds_before_rounding(tmp_path: Path) -> None:
    model = make_model("llama")
    path = make_lora(model, tmp_path / "a", rank=8, seed=1)
    prompt = random_prompt(20)
    answers = {}
    for adapter_dtype in ("float32", "bfloat16"):
        engine = TinyEngine(model, tmp_path, dtype="bfloat16", adapter_dtype=adapter_dtype)
        ask = Ask("a", prompt, engine.add("a", path), 4)
        answers[adapter_dtype] = engine.run([ask])["a"]
    assert not np.array_equal(answers["float32"].logprobs, answers["bfloat16"].logprobs)
