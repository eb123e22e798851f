"""Adapter directories as a test sees them: read without PEFT, edited by hand, applied by hooks.

config, tensors = read_adapter(path)
with applied(model, decode(config, tensors, spec).forms):
    model(...)                                     # y += up (down x) on the plain base, nothing of ours around it
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peft_core.errors import AdapterError
from peft_core.forms import AdapterForms, LinearDelta
from peft_core.methods import DecodeReport, check
from peft_core.spec import BaseModelSpec
from tests.tiny_models import make_lora, make_model

_FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_NAMES = {**_FLOATS, torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


@dataclass
class FileTensors:
    """A tensor source over a safetensors file; counts what is read."""

    path: Path
    num_reads: int = 0

    @functools.cached_property
    def header(self) -> dict[str, Entry]:
        with safe_open(self.path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Entry(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}

    def get(self, name: str) -> torch.Tensor:
        self.num_reads += 1
        with safe_open(self.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


@dataclass
class LoadedTensors:
    """A tensor source over tensors in memory."""

    tensors: Mapping[str, torch.Tensor]

    @property
    def header(self) -> dict[str, Entry]:
        return {name: Entry(_NAMES[value.dtype], tuple(value.shape)) for name, value in self.tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def read_adapter(directory: Path) -> tuple[dict[str, Any], FileTensors]:
    config: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return config, FileTensors(directory / "adapter_model.safetensors")


def load_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """As `read_adapter`, but everything in memory, to be changed by a test."""
    config, source = read_adapter(directory)
    return config, load_file(source.path)


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write an adapter directory; objects of the config keep their order."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), directory / "adapter_model.safetensors")
    return directory


class SavedAdapter:
    """A healthy adapter for the shared llama, in memory, to be spoilt."""

    def __init__(self, directory: Path, *, targets: list[str], **options: Any) -> None:
        self.config, self.tensors = load_adapter(
            make_lora(shared_model("llama"), directory, targets=targets, **options)
        )

    def check(self, **fields: Any) -> DecodeReport:
        """The report with some fields of the config changed."""
        return check(self.config | fields, LoadedTensors(self.tensors).header, shared_spec("llama"))

    def refusal(self, **fields: Any) -> AdapterError:
        """As `check`, where it must raise."""
        with pytest.raises(AdapterError) as refusal:
            self.check(**fields)
        return refusal.value


@functools.cache
def shared_model(arch: str) -> PreTrainedModel:
    """One model per architecture for the whole run; nobody changes it."""
    return make_model(arch, seed=11)


@functools.cache
def shared_spec(arch: str) -> BaseModelSpec:
    return BaseModelSpec.from_model(shared_model(arch), fingerprint="test")


@contextmanager
def applied(model: PreTrainedModel, forms: AdapterForms) -> Iterator[PreTrainedModel]:
    """The base with the forms added to its linears by forward hooks."""
    hooks = [model.get_submodule(path).register_forward_hook(_adder(delta)) for path, delta in forms.linear.items()]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def logits_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Logits of one sequence.  # [tokens, vocab] float32"""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0].float()
        return logits


def greedy(model: Any, token_ids: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
    tokens: list[int] = out[0, len(token_ids) :].tolist()
    return tokens


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest magnitude."""
    return float((got - expected).abs().max() / expected.abs().max())


def smallest_margin(logits: torch.Tensor) -> float:
    """Smallest distance between the best two logits of any row."""
    best = logits.topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1]).min())


def _adder(delta: LinearDelta) -> Any:
    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + (inputs[0].float() @ delta.down.T @ delta.up.T).to(output.dtype)

    return add
