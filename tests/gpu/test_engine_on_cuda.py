"""The whole engine on a CUDA device: adapters and base mixed, in chunks, after a prefix hit, against HF PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_engine import Ask, TinyEngine, oracle_logits, relative_error
from tests.tiny_models import all_targets, load_oracle, make_lora, make_model, random_prompt

pytestmark = pytest.mark.gpu

TOLERANCE = 2e-4  # float32 without TF32; the oracle runs on the CPU


@pytest.fixture(autouse=True)
def _needs_a_device() -> None:
    assert torch.cuda.is_available(), "these tests need a CUDA device; `make test` runs the others"


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gpt2"])
def test_mixed_rows_equal_peft(arch: str, tmp_path: Path) -> None:
    model = make_model(arch)
    engine = TinyEngine(model, tmp_path, device="cuda", chunk_size=32)
    asks, oracles = [], {}
    for index, rank in enumerate((2, 8, 17)):
        path = make_lora(model, tmp_path / f"r{rank}", rank=rank, targets=all_targets(arch), seed=index)
        ask = Ask(f"r{rank}", random_prompt(20 + 30 * index, seed=index), engine.add(f"r{rank}", path))
        asks.append(ask)
        oracles[ask.name] = load_oracle(model, path)
    asks.append(Ask("base", random_prompt(50, seed=9)))
    oracles["base"] = model

    for _ in range(2):  # the second time from the prefix cache
        answers = engine.run(asks)
        for ask in asks:
            expected = oracle_logits(oracles[ask.name], ask.prompt, answers[ask.name].tokens)
            assert relative_error(answers[ask.name], expected) <= TOLERANCE
    wrong = oracle_logits(model, asks[0].prompt, answers["r2"].tokens)  # negative control
    assert relative_error(answers["r2"], wrong) > 1e-2


def test_evicted_adapters_come_back_unchanged(tmp_path: Path) -> None:
    model = make_model("llama")
    engine = TinyEngine(model, tmp_path, device="cuda")
    ask = Ask("a", random_prompt(20), engine.add("one", make_lora(model, tmp_path / "one")))
    before = engine.run([ask])["a"]
    assert ask.adapter is not None
    assert engine.engine.evict(ask.adapter.key)
    after = engine.run([ask])["a"]
    assert np.allclose(before.logprobs, after.logprobs, atol=1e-4)
