"""Adapters of the kinds of PEFT that become low-rank additions: made by PEFT itself, with random values.

directory = make_sample(sample, "llama", tmp_path)
oracle = load_oracle(shared_model("llama"), directory)            what PEFT computes from the files
forms_of(directory, "llama")                                      what this project makes of them
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_core.methods import decode
from peft_core.methods.report import Decoded
from tests.peft_core.adapter_files import read_adapter, shared_model, shared_spec
from tests.tiny_models import all_targets, attention_targets

LINEAR_ONLY = ("llama", "qwen2")  # PEFT makes the kind on nn.Linear, and GPT-2 has none
WITH_CONV1D = (*LINEAR_ONLY, "gpt2")


class Sample(NamedTuple):
    """One way to train one kind."""

    config: Callable[..., Any]  # of PEFT
    fields: dict[str, Any]
    architectures: tuple[str, ...]
    spread: float = 0.3  # standard deviation added to every trained value
    spreads: dict[str, float] = {}  # noqa: RUF012 - by a part of a parameter's name
    everywhere: bool = True  # all linears, else those of attention


def make_sample(sample: Sample, arch: str, directory: Path, *, seed: int = 5, **fields: Any) -> Path:
    """Train nothing: wrap the shared model, move every trained value, save."""
    targets = all_targets(arch) if sample.everywhere else attention_targets(arch)
    values = {"target_modules": targets, "task_type": "CAUSAL_LM", **sample.fields, **fields}
    with warnings.catch_warnings():  # e.g. of what is not saved
        warnings.simplefilter("ignore")
        config = sample.config(**values)
    adapted = wrapped(shared_model(arch), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                spread = next((spread for part, spread in sample.spreads.items() if part in name), sample.spread)
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    save(adapted, directory)
    return directory


def wrapped(model: PreTrainedModel, config: Any) -> PeftModel:
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(17)  # PEFT starts some values at random
        warnings.simplefilter("ignore")
        adapted: PeftModel = get_peft_model(copy.deepcopy(model), config)
    return adapted


def save(adapted: PeftModel, directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(directory))


def decoded(directory: Path, arch: str) -> Decoded:
    config, tensors = read_adapter(directory)
    return decode(config, tensors, shared_spec(arch), ModelWeights(shared_model(arch)))


class ModelWeights:
    """A base's weights, from the model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def weight(self, path: str) -> torch.Tensor:
        module: Any = self._model.get_submodule(path)
        weight: torch.Tensor = module.weight.detach().float()
        return weight.T.contiguous() if isinstance(module, Conv1D) else weight

    def bias(self, path: str) -> torch.Tensor | None:
        bias: torch.Tensor | None = getattr(self._model.get_submodule(path), "bias", None)
        return None if bias is None else bias.detach().float()
