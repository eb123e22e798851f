"""Healthy adapters of the kinds in `site_samples`, in memory, to be spoilt: one thing changed, the rest as saved."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig

from peft_core.errors import AdapterError
from peft_core.methods import check, decode
from tests.peft_core.adapter_files import LoadedTensors, load_adapter, shared_model, shared_spec
from tests.peft_core.site_samples import SAMPLES
from tests.peft_core.tuner_samples import ModelWeights, Sample, make_sample

NORMS = Sample(LNTuningConfig, {"target_modules": ["input_layernorm", "norm"]}, ("llama",))
ONE_A_KIND = (
    "ia3",
    "beft",
    "oft",
    "boft",
    "road_1",
    "lokr",
    "fourierft",
    "c3a",
    "randlora",
    "hira",
    "shira",
    "supertuning, lora",
    "waveft",
    "glora",
    "frod",
    "norms",
)


class Spoilt:
    """A healthy adapter in memory, to be spoilt."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor], arch: str = "llama") -> None:
        self.config, self.tensors, self.arch = config, tensors, arch

    def check(self, **limits: int) -> Any:
        return check(self.config, LoadedTensors(self.tensors).header, shared_spec(self.arch), **limits)

    def decode(self) -> Any:
        base = ModelWeights(shared_model(self.arch))
        return decode(self.config, LoadedTensors(self.tensors), shared_spec(self.arch), base)

    def refusal(self) -> AdapterError:
        with pytest.raises(AdapterError) as refusal:
            self.check()
        return refusal.value

    def refusal_of_values(self) -> AdapterError:
        self.check()
        with pytest.raises(AdapterError) as refusal:
            self.decode()
        return refusal.value

    def first(self, ending: str = "") -> str:
        """The first tensor of a module whose name ends so."""
        return next(name for name in self.tensors if name.endswith(ending) and ".layers." in name)


@functools.cache
def _stored(name: str, arch: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with tempfile.TemporaryDirectory() as directory:
        sample = NORMS if name == "norms" else SAMPLES[name]
        return load_adapter(make_sample(sample, arch, Path(directory)))


def spoilt(name: str, arch: str = "llama") -> Spoilt:
    config, tensors = _stored(name, arch)
    return Spoilt(dict(config), dict(tensors), arch)


def module_of(tensor: str) -> str:
    """Everything before the part that the kind has put there."""
    for mark in ("mlp.", "self_attn."):
        if mark in tensor:
            head, _, rest = tensor.partition(mark)
            return f"{head}{mark}{rest.partition('.')[0]}"
    return tensor.partition(".ln_tuning_layers")[0]


def one_of_each(adapter: Spoilt) -> Mapping[str, torch.Tensor]:
    """One tensor of each name that means something, of the first module."""
    irrelevant = adapter.check().irrelevant_tensors
    module = module_of(adapter.first())
    found = {
        name: values
        for name, values in adapter.tensors.items()
        if name not in irrelevant and (module_of(name) == module or ".layers." not in name)
    }
    shared = {name: values for name, values in found.items() if name.endswith(("_A", "_B", "self_attn_q_proj"))}
    return {name: values for name, values in found.items() if module_of(name) == module} | shared


def flat(forms: Any) -> dict[str, torch.Tensor]:
    """All tensors of some forms, by a name of their own."""
    found: dict[str, torch.Tensor] = {}
    for part in ("linear", "changes", "norms"):
        for path, form in getattr(forms, part).items():
            for field in form.__slots__:
                value = getattr(form, field)
                if isinstance(value, torch.Tensor):
                    found[f"{part} {path} {field}"] = value
    return found
