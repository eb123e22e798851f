"""LoRA adapters of every variant as PEFT saves them, and the comparison of what is decoded with PEFT's own reading.

model = tiny_base("qwen2", tied=True)
directory = make_lora(model, tmp_path, targets=["embed_tokens"])
assert_equals_peft(model, directory)                  # logits of a plain forward with the decoded forms, by hooks
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_core.forms import AdapterForms
from peft_core.methods import check, decode
from peft_core.methods.report import Decoded
from peft_core.spec import BaseModelSpec
from tests.peft_core.adapter_files import load_adapter, logits_of, read_adapter, write_adapter
from tests.plain_forms import applied
from tests.tiny_engine import ModelWeights
from tests.tiny_models import load_oracle, make_lora, make_model, random_prompt

TOLERANCE = 2e-5  # of logits whose standard deviation is about 3
VISIBLE = 0.05  # an adapter must change some logit by as much, or the comparison says nothing
PROMPT = random_prompt(24, seed=4)


@functools.cache
def tiny_base(arch: str, *, tied: bool = False, **overrides: Any) -> PreTrainedModel:
    """One model for the whole run; nobody changes it."""
    return make_model(arch, seed=12, **({"tie_word_embeddings": True} if tied else {}), **overrides)


def spec_of(model: PreTrainedModel) -> BaseModelSpec:
    return BaseModelSpec.from_model(model, fingerprint="test")


def decoded(model: PreTrainedModel, directory: Path, *, with_base: bool = True) -> Decoded:
    config, tensors = read_adapter(directory)
    return decode(config, tensors, spec_of(model), ModelWeights(model) if with_base else None)


def logits_with(model: PreTrainedModel, forms: AdapterForms, prompt: list[int] = PROMPT) -> torch.Tensor:
    with applied(model, forms, spec_of(model)) as adapted:
        return logits_of(adapted, prompt)


def given(tensor: torch.Tensor | None) -> torch.Tensor:
    """A part of a form that must be there."""
    assert tensor is not None
    return tensor


def error_against_peft(model: PreTrainedModel, directory: Path, forms: AdapterForms) -> float:
    expected = logits_of(load_oracle(model, directory), PROMPT)
    return float((logits_with(model, forms) - expected).abs().max())


def assert_equals_peft(model: PreTrainedModel, directory: Path, *, tolerance: float = TOLERANCE) -> Decoded:
    """Every logit of a prompt; and PEFT's adapter is visible, so that agreement means something."""
    config, tensors = read_adapter(directory)
    forms, report = decoded(model, directory)
    assert check(config, tensors.header, spec_of(model)) == report
    expected = logits_of(load_oracle(model, directory), PROMPT)
    assert float((logits_of(model, PROMPT) - expected).abs().max()) > VISIBLE
    assert float((logits_with(model, forms) - expected).abs().max()) < tolerance
    return Decoded(forms, report)


def tables_of(arch: str) -> tuple[str, str]:
    """Paths of the embedding and of the head."""
    return ("transformer.wte" if arch == "gpt2" else "model.embed_tokens"), "lm_head"


def resized_adapter(model: Any, num_rows: int, directory: Path, **options: Any) -> tuple[Any, Path]:
    """An adapter trained on a resized copy of the base, and that copy; the file has both tables."""
    resized = copy.deepcopy(model)
    torch.manual_seed(7)
    resized.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        for table in {resized.get_input_embeddings().weight, resized.get_output_embeddings().weight}:
            table[min(num_rows, 256) :] = 0.1
            table.add_(0.05 * torch.randn(table.shape))
    saved = make_lora(resized, directory, **options)
    config, tensors = load_adapter(saved)
    for path in tables_of(model.config.model_type):
        module = resized.get_submodule(path)
        if not any(name.startswith(f"base_model.model.{path}.") for name in tensors):
            tensors[f"base_model.model.{path}.weight"] = module.weight.detach().clone()
    return resized, write_adapter(directory, config, tensors)
