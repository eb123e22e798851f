"""Virtual tokens and invocations keep equal bits in any company, and bfloat16 loses no more than usual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_core.forms import AdapterForms, KVPrefix
from tests.engine.test_row_bits import assert_same_bits, crowd
from tests.prompt_adapters import PREFIXES, make_prompt_adapter, oracle_logits
from tests.tiny_engine import Ask, TinyEngine, relative_error
from tests.tiny_models import HEAD_DIM, NUM_LAYERS, all_targets, load_oracle, make_lora, make_model, random_prompt

P = 21
INVOCATION = [17, 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_with_virtual_tokens_is_bit_equal_in_any_company(dtype: str, tmp_path: Path) -> None:
    model = make_model("qwen2")
    engine = TinyEngine(model, tmp_path, dtype=dtype, chunk_size=32, enable_prefix_caching=False)
    paths = {kind: make_prompt_adapter(kind, model, tmp_path / kind, num_tokens=P) for kind in ("prefix", "prompt")}
    paths["lora"] = make_lora(model, tmp_path / "lora", seed=1)
    invoked: dict[str, Any] = {"alora_invocation_tokens": INVOCATION, "targets": all_targets("qwen2")}
    paths["alora"] = make_lora(model, tmp_path / "alora", seed=2, **invoked)
    tickets = {name: engine.add(name, path) for name, path in paths.items()}
    prompt = random_prompt(45, seed=1)
    prompt[29:31] = INVOCATION  # its rows before and after lie in one chunk
    mine = [Ask(name, prompt, ticket, 9) for name, ticket in tickets.items()]
    alone = {ask.name: engine.run([ask])[ask.name] for ask in mine}
    for size, stagger_steps in ((2, 0), (13, 0), (9, 1)):
        others = crowd([None, *tickets.values()], size)
        answers = engine.run([*others[: size // 2], *mine, *others[size // 2 :]], stagger_steps=stagger_steps)
        for ask in mine:
            assert_same_bits(alone[ask.name], answers[ask.name])
    assert len({answer.logprobs.tobytes() for answer in alone.values()}) == len(mine), "or they all do nothing"


@pytest.mark.parametrize("kind", ["prefix", "prompt", "cartridge"])
def test_a_prefix_hit_changes_no_bit_where_chunks_are_whole_blocks(kind: str, tmp_path: Path) -> None:
    """What is shared was computed in the same chunks, so the second answer is the first one's."""
    model = make_model("llama", seed=1)
    engine = TinyEngine(model, tmp_path, chunk_size=16)
    ticket = engine.add(kind, make_prompt_adapter(kind, model, tmp_path / kind, num_tokens=P))
    prompt = random_prompt(30, seed=2)
    first, second = (engine.run([Ask("a", prompt, ticket)])["a"] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48 - P)
    assert_same_bits(first, second)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_bfloat16_stays_near_peft_in_bfloat16(kind: str, tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    path = make_prompt_adapter(kind, model, tmp_path / "a", num_tokens=P)
    engine = TinyEngine(model, tmp_path, dtype="bfloat16", chunk_size=16)
    asked = Ask("a", random_prompt(30, seed=3), engine.add("a", path))
    answer = engine.run([asked])["a"]
    half = load_oracle(model.to(torch.bfloat16), path)
    assert relative_error(answer, oracle_logits(half, kind, P, asked.prompt, answer.tokens)) < 0.03


def test_a_prefix_reaches_the_cache_exactly(tmp_path: Path) -> None:
    """The cache holds the prefix's own numbers in the model's dtype, in every layer, whatever the rows computed."""
    assert "prefix" in PREFIXES
    model = make_model("llama", seed=1)
    generator = torch.Generator().manual_seed(4)
    keys, values = (torch.randn((NUM_LAYERS, P, 2, HEAD_DIM), generator=generator) for _ in range(2))
    engine = TinyEngine(model, tmp_path, dtype="bfloat16", chunk_size=16)
    ticket = engine.add_forms("a", AdapterForms(prefix=KVPrefix(keys, values, P)))
    engine.run([Ask("a", random_prompt(9), ticket)])
    units = engine.engine._blocks.match(engine.engine._blocks._by_hash)
    cache = engine.engine._runner.cache  # type: ignore[attr-defined]
    first = cache.blocks.view(cache.num_units, NUM_LAYERS, 2, 16, 2, HEAD_DIM)[units[0]]
    assert torch.equal(first[:, 0], keys[:, :16].bfloat16())
    assert torch.equal(first[:, 1], values[:, :16].bfloat16())
    assert np.isfinite(first.float().numpy()).all()
