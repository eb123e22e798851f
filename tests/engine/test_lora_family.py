"""Variants of LoRA and replaced parts of the base, all in one batch with plain LoRA and the bare base, equal PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft.tuners.lora.config import KasaConfig

from tests.peft_core.lora_samples import resized_adapter
from tests.tiny_engine import Ask, TinyEngine, assert_equals_oracle, oracle_logits
from tests.tiny_models import all_targets, attention_targets, load_oracle, make_lora, make_model, random_prompt

INPUTS = {"gpt2": "wte"}


def family(arch: str) -> dict[str, dict[str, Any]]:
    """Options of `make_lora`, by name."""
    table, attention, every = INPUTS.get(arch, "embed_tokens"), attention_targets(arch), all_targets(arch)
    members: dict[str, dict[str, Any]] = {
        "plain": {"targets": every},
        "dora": {"targets": every, "use_dora": True},
        "bias": {"targets": attention, "bias": "all"},
        "up bias": {"targets": attention, "lora_bias": True},
        "norms": {"targets": attention, "modules_to_save": ["ln_f", "ln_1"] if arch == "gpt2" else ["norm"]},
        "container": {"targets": attention, "modules_to_save": ["mlp"]},
        "tables": {"targets": [table, "lm_head"]},
        "dora tables": {"targets": [table, "lm_head"], "use_dora": True},
        "saved tables": {"targets": attention, "modules_to_save": [table, "lm_head"]},
        "tokens": {"targets": attention, "trainable_token_indices": [5, 7, 9, 200]},
        "pissa": {"targets": attention, "init_lora_weights": "pissa"},
    }
    if arch != "gpt2":
        members["kasa"] = {"targets": attention, "kasa_config": KasaConfig()}
    return members


@pytest.mark.parametrize(
    ("arch", "tied"),
    [("llama", False), ("qwen2", True), ("gpt2", True), ("gemma3", True), ("phi3", False)],
    ids=lambda value: str(value),
)
def test_the_family_in_one_batch_equals_peft(arch: str, tied: bool, tmp_path: Path) -> None:
    model = make_model(arch, seed=3, tie_word_embeddings=tied)
    engine = TinyEngine(model, tmp_path, chunk_size=16, pool_bytes=96 << 20)
    asks = [Ask("base", random_prompt(21, seed=1))]
    for seed, (name, options) in enumerate(family(arch).items()):
        directory = make_lora(model, tmp_path / name, seed=seed, **options)
        asks.append(Ask(name, random_prompt(11 + 3 * seed, seed=seed), engine.add(name, directory)))
    answers = engine.run(asks, stagger_steps=1)
    for ask in asks:
        oracle = model if ask.adapter is None else load_oracle(model, tmp_path / ask.name)
        assert_equals_oracle(ask, answers[ask.name], oracle)


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "lm_head"]], ids=["linears", "tables"])
def test_a_smaller_vocabulary_is_served_as_the_resized_model_computes(targets: list[str], tmp_path: Path) -> None:
    """In one batch with the bare base; larger ones are in test_wide_vocabulary."""
    model = make_model("qwen2", seed=3, tie_word_embeddings=True)
    engine = TinyEngine(model, tmp_path)
    resized, directory = resized_adapter(model, 250, tmp_path / "adapter", targets=targets)
    prompt = [token % 250 for token in random_prompt(30, seed=2)]
    asks = [Ask("own", prompt, engine.add("own", directory)), Ask("base", prompt)]
    answers = engine.run(asks)
    assert_equals_oracle(asks[1], answers["base"], model)
    answer = answers["own"]
    logits = oracle_logits(load_oracle(resized, directory), prompt, answer.tokens)
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    assert np.abs(answer.logprobs[:, :250] - expected).max() < 1e-4
    assert all(token < 250 for token in answer.tokens)
