"""A real engine over a tiny model, driven step by step, and HF PEFT beside it as the oracle.

engine = TinyEngine(model, tmp_path, chunk_size=32)
sql = engine.add("sql", make_lora(model, tmp_path / "sql"))
answers = engine.run([Ask("a", prompt, sql), Ask("b", prompt)])
answers["a"].logprobs      # [generated tokens, vocabulary] float64: the whole distribution, through the public door
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from peft_core.forms import AdapterForms
from peft_core.image import pack, write_image
from peft_core.methods import decode
from peft_core.spec import BaseModelSpec
from peft_core.traits import traits_of
from server.engine.assembly import build_engine
from server.engine.config import EngineConfig
from server.engine.request import AdapterTicket, EngineRequest, FinishReason, SamplingParams
from tests.tiny_models import VOCAB

RELATIVE_TOLERANCE = 1e-5  # of the largest logit, float32
TIE_MARGIN = 1e-4  # top two logits closer than this may swap


@dataclass(frozen=True)
class Ask:
    name: str
    prompt: list[int]
    adapter: AdapterTicket | None = None
    num_tokens: int = 6
    task_id: int | None = None


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish: FinishReason | None = None
    error: Any = None

    @property
    def logprobs(self) -> np.ndarray:
        return np.stack(self.rows)


WEIGHT_FILES = ("adapter_model.safetensors", "adapter.safetensors")
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


class MemoryTensors:
    """A `TensorSource` over tensors that are in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.header = {
            name: _Shape(SAFETENSORS_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()
        }

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class ModelWeights:
    """`BaseWeights` of a model that is in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def weight(self, path: str) -> torch.Tensor:
        module = dict(self.model.named_modules()).get(path)
        name = path if module is None else f"{path}.weight"
        weight: torch.Tensor = self.model.get_parameter(name).detach().float()
        return weight.T if type(module).__name__ == "Conv1D" else weight

    def bias(self, path: str) -> torch.Tensor | None:
        bias = getattr(self.model.get_submodule(path), "bias", None)
        return bias.detach().float() if isinstance(bias, torch.Tensor) else None


@dataclass(frozen=True)
class _Shape:
    dtype: str
    shape: tuple[int, ...]


class TinyEngine:
    def __init__(self, model: PreTrainedModel, directory: Path, **config: Any) -> None:
        base = directory / "base"
        if not base.exists():
            model.save_pretrained(base)
        values = {"dtype": "float32", "pool_bytes": 48 << 20, "num_threads": 1, "max_num_seqs": 64, **config}
        if "chunk_size" in values:
            values.setdefault("max_num_batched_tokens", 4 * values["chunk_size"])
        self.directory = directory
        self.engine, self.description = build_engine(EngineConfig(model=str(base), **values), _nobody_listens)
        self.spec = BaseModelSpec.from_json(self.description.spec)
        self.base = ModelWeights(model)
        self.most_adapters = 0  # distinct ones in one step, the base not counted

    def add(self, name: str, adapter: Path) -> AdapterTicket:
        """Decode and pack an adapter directory, as the loader does."""
        return self.add_forms(name, self.decode(adapter))

    def decode(self, adapter: Path) -> AdapterForms:
        config = json.loads((adapter / "adapter_config.json").read_text())
        weights = next(adapter / name for name in WEIGHT_FILES if (adapter / name).exists())
        tensors = MemoryTensors(load_file(str(weights)))
        return decode(config, tensors, self.spec, self.base).forms

    def add_forms(self, name: str, forms: AdapterForms) -> AdapterTicket:
        """Pack forms that no file was decoded for."""
        image = pack(forms, self.spec, self.description.adapter_dtype)
        path = self.directory / f"{name}-{self.description.adapter_dtype}.img"
        write_image(path, image)
        return AdapterTicket(f"digest-of-{name}", name, str(path), image.num_bytes, traits_of(forms))

    def submit(self, ask: Ask) -> None:
        params = SamplingParams(max_new_tokens=ask.num_tokens, ignore_eos=True, num_logprobs=VOCAB)
        self.engine.submit(EngineRequest(ask.name, tuple(ask.prompt), params, adapter=ask.adapter, task_id=ask.task_id))

    def run(self, asks: Iterable[Ask], *, stagger_steps: int = 0) -> dict[str, Answer]:
        """All of them together, or one joining every `stagger_steps` steps; until nothing is left."""
        waiting = list(asks)
        answers: dict[str, Answer] = {ask.name: Answer() for ask in waiting}
        num_steps = 0
        while waiting or self.engine.has_work:
            while waiting and (not stagger_steps or num_steps % stagger_steps == 0):
                self.submit(waiting.pop(0))
                if stagger_steps:
                    break
            self.step_into(answers)
            num_steps += 1
            assert num_steps < 200_000, "the engine does not come to an end"
        self.engine.check_integrity()
        return answers

    def step_into(self, answers: dict[str, Answer]) -> None:
        deltas = self.engine.step().special
        self.most_adapters = max(self.most_adapters, self.engine.stats().last_step_adapters)
        for delta in deltas:
            answer = answers[delta.request_id]
            answer.tokens += delta.token_ids
            for record in delta.logprobs:
                row = np.full(VOCAB, np.nan)
                for token, logprob in record.top:
                    row[token] = logprob
                answer.rows.append(row)
            answer.num_cached_tokens += delta.num_cached_tokens
            answer.finish = delta.finish or answer.finish
            answer.error = delta.error or answer.error


def oracle_logits(oracle: Any, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Logits [generated tokens, vocabulary] of the model's own forward over prompt and answer, unpadded, alone."""
    ids = torch.tensor([prompt + tokens])
    with torch.inference_mode():
        logits = oracle(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    rows: np.ndarray = logits.double().numpy()
    return rows


def relative_error(answer: Answer, logits: np.ndarray) -> float:
    """Largest difference of log probabilities, relative to the largest logit."""
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return float(np.abs(answer.logprobs - expected).max() / np.abs(logits).max())


def assert_equals_oracle(ask: Ask, answer: Answer, oracle: Any) -> None:
    """The distribution at every step, and the greedy token wherever the oracle has no tie."""
    assert_equals_logits(ask, answer, oracle_logits(oracle, ask.prompt, answer.tokens))


def assert_equals_logits(ask: Ask, answer: Answer, logits: np.ndarray) -> None:
    """`logits` [generated tokens, vocabulary]: what the oracle says of the answer's own tokens."""
    assert answer.finish is FinishReason.LENGTH, answer.error
    assert relative_error(answer, logits) <= RELATIVE_TOLERANCE, ask.name
    for token, row in zip(answer.tokens, logits, strict=True):
        assert row.max() - row[token] <= TIE_MARGIN, f"{ask.name}: {token} is not the oracle's greedy token"


def _nobody_listens(stage: str, fraction: float) -> None:
    pass
