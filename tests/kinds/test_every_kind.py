"""Every kind that HF PEFT writes, on many architectures, all in one running batch, each equal to PEFT alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.kinds.served import Served, prompt_for, serve_every_kind
from tests.kinds.zoo import ABSENT, KINDS, make_adapter, peft_logits
from tests.tiny_engine import Answer, Ask, relative_error
from tests.tiny_models import load_oracle, make_model, random_prompt

QUICK = ("llama", "qwen2", "gpt2")
ARCHITECTURES = (*QUICK, "qwen3", "mistral", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "mixtral")
LENGTHS = {9: 32, 41: 6}  # tokens of the prompt -> of the answer


@cache
def answered(arch: str, directory: Path) -> tuple[Served, dict[str, Ask], dict[str, Answer]]:
    """One run an architecture: all kinds and the base share every step."""
    served = serve_every_kind(arch, directory, chunk_size=16)
    asks = [
        served.ask(kind, prompt_for(kind, length, seed=index), num_tokens=num_tokens)
        for index, kind in enumerate([*served.tickets, "base"])
        for length, num_tokens in LENGTHS.items()
    ]
    return served, {ask.name: ask for ask in asks}, served.engine.run(asks, stagger_steps=1)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


CASES = [
    pytest.param(arch, kind, marks=[] if arch in QUICK else pytest.mark.slow)
    for arch in ARCHITECTURES
    for kind in (*KINDS, "base")
    if kind not in ABSENT.get(arch, ())
]


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_kind_in_a_mixed_batch_equals_its_own_library(arch: str, kind: str, workshop: Path) -> None:
    served, asks, answers = answered(arch, workshop / arch)
    assert kind not in served.refused, served.refused[kind].message
    for length in LENGTHS:
        served.check(kind, asks[f"{kind}-{length}"], answers[f"{kind}-{length}"])


def test_the_comparison_sees_every_kind(tmp_path: Path) -> None:
    """Negative control: the base's answer is no adapter's."""
    model = make_model("llama", seed=1)
    prompt = prompt_for("alora", 20, seed=4)
    tokens = random_prompt(4, seed=5)
    base = peft_logits("base", model, prompt, tokens)
    answer = Answer(tokens, list(base - np.logaddexp.reduce(base, axis=-1, keepdims=True)))
    for index, kind in enumerate(KINDS):
        oracle = load_oracle(model, make_adapter(kind, model, "llama", tmp_path / kind, seed=index))
        assert relative_error(answer, peft_logits(kind, oracle, prompt, tokens)) > 1e-2, kind


@pytest.mark.parametrize("kind", sorted(ABSENT["gpt2"]))
def test_absent_means_that_the_library_itself_cannot(kind: str, tmp_path: Path) -> None:
    """It raises when the adapter is made or run, or writes a file without tensors."""
    model = make_model("gpt2", seed=1)
    try:
        oracle = load_oracle(model, make_adapter(kind, model, "gpt2", tmp_path / kind))
        peft_logits(kind, oracle, [2, 3], [4])
    except (TypeError, ValueError, RuntimeError):
        return
    assert not load_file(str(tmp_path / kind / "adapter_model.safetensors"))
