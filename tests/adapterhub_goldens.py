"""What AdapterHub's library computes with its adapters, as `make goldens` has stored it, and the bases it did it on.

golden = read_golden("llama", "seq_bn")
config, tensors = golden.files()               # as the store would hand them to a decoder
golden.prompt, golden.answer, golden.logits    # [last rows of prompt and answer, vocabulary]
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_core.spec import BaseModelSpec
from peft_core.trace import traced_spec
from server.engine.request import FinishReason
from tests.tiny_engine import Answer, MemoryTensors

DIRECTORY = Path(__file__).parent / "goldens" / "adapterhub"
INDEX: dict[str, Any] = json.loads((DIRECTORY / "goldens.json").read_text())
BASES: tuple[str, ...] = tuple(INDEX["bases"])
CASES: list[tuple[str, str]] = [(base, name) for base in BASES for name in INDEX["bases"][base] if name != "base"]
PREFIXES = ("prefix", "prefix_flat", "mam")
TOLERANCE = 1e-4  # of log probabilities


@dataclass(frozen=True)
class Golden:
    base: str
    name: str
    prompt: list[int]
    answer: list[int]

    @property
    def directory(self) -> Path:
        return DIRECTORY / self.base / self.name

    @property
    def logits(self) -> torch.Tensor:
        """The library's logits.  # [rows, vocabulary]"""
        return _all_logits(self.base)[self.name]

    def files(self) -> tuple[dict[str, Any], MemoryTensors]:
        return read_files(self.directory)


def read_golden(base: str, name: str) -> Golden:
    told = INDEX["bases"][base][name]
    return Golden(base, name, told["prompt"], told["answer"])


def read_files(directory: Path) -> tuple[dict[str, Any], MemoryTensors]:
    """Config and tensors of an adapter's directory, to be spoilt by a test."""
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, MemoryTensors(load_file(directory / "adapter.safetensors"))


def assert_is_the_library_s(golden: Golden, answer: Answer) -> None:
    """The engine's greedy tokens are the library's, and its log probabilities within TOLERANCE."""
    assert answer.finish is FinishReason.LENGTH, answer.error
    assert answer.tokens == golden.answer, golden.name
    expected = golden.logits[-len(golden.answer) - 1 : -1].double().log_softmax(-1)
    difference = (torch.from_numpy(answer.logprobs) - expected).abs().max()
    assert float(difference) <= TOLERANCE, golden.name


@functools.cache
def golden_model(base: str) -> PreTrainedModel:
    """One of the goldens' bases as today's transformers loads it; nobody changes it."""
    factory: Any = AutoModelForCausalLM
    model: PreTrainedModel = factory.from_pretrained(
        DIRECTORY / base / "base", dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    return model


@functools.cache
def golden_spec(base: str) -> BaseModelSpec:
    model = golden_model(base)
    spec = traced_spec(model, BaseModelSpec.from_model(model, fingerprint="golden"))
    config = model.config
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return replace(spec, num_kv_heads=num_kv_heads, head_dim=head_dim)


@functools.cache
def _all_logits(base: str) -> dict[str, torch.Tensor]:
    return load_file(DIRECTORY / base / "logits.safetensors")
