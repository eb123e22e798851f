"""A bottleneck in every layer, in the format of AdapterHub's `adapters` library, trained with hooks of its own.

    seq_bn (Pfeiffer et al. 2020)      y = x + up(relu(down x)),  x what a layer gives to the next

The library need not be installed: it would pin another `transformers`. What is written is what it writes, so that
it loads these files, and so does whatever else reads them.

Running example: hidden size 128, reduction factor 8, the adapter named "robot-bottleneck"
    model.layers.0.output_adapters.adapters.robot-bottleneck.adapter_down.0.weight    [16, 128]
    model.layers.0.output_adapters.adapters.robot-bottleneck.adapter_up.weight        [128, 16]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from server.demo import BASE_NAME

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter.safetensors"
_VERSION = "adapters.1.3.0"

# Everything that the library states of a sequential bottleneck, but for the reduction factor.
_SEQ_BN: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """What is chosen; the rest is the library's `seq_bn`."""

    reduction_factor: int  # hidden size over the width of the bottleneck


class BottleneckModel(nn.Module):
    """The base, frozen, with a bottleneck behind every layer; it is called as the base is."""

    def __init__(self, base: LlamaForCausalLM, config: BottleneckConfig) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.config = config
        hidden_size = base.config.hidden_size
        width = hidden_size // config.reduction_factor
        bottlenecks = [_Bottleneck(hidden_size, width) for _ in base.model.layers]
        self.bottlenecks = nn.ModuleList(bottlenecks)
        for layer, bottleneck in zip(base.model.layers, bottlenecks, strict=True):
            layer.register_forward_hook(_behind(bottleneck))

    def forward(self, **inputs: Any) -> Any:
        return self.base(**inputs)

    def save(self, directory: Path, name: str) -> None:
        """Write what the library writes for an adapter of this name."""
        base = self.base.config
        config = {
            "config": _SEQ_BN | {"reduction_factor": self.config.reduction_factor},
            "hidden_size": base.hidden_size,
            "model_class": type(self.base).__name__,
            "model_name": BASE_NAME,
            "model_type": base.model_type,
            "name": name,
            "version": _VERSION,
        }
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(self._tensors(name), directory / WEIGHTS_FILE, metadata={"format": "pt"})

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for number, bottleneck in enumerate(self.bottlenecks):
            stem = f"model.layers.{number}.output_adapters.adapters.{name}"
            for key, tensor in bottleneck.state_dict().items():
                tensors[f"{stem}.{key}"] = tensor.contiguous()
        return tensors


class _Bottleneck(nn.Module):
    """Its parts bear the library's names. It starts as the library's does: almost as nothing."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        down, up = nn.Linear(hidden_size, width), nn.Linear(width, hidden_size)
        for linear in (down, up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.adapter_down = nn.Sequential(down, nn.ReLU())
        self.adapter_up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.adapter_up(self.adapter_down(x))
        return y


def _behind(bottleneck: _Bottleneck) -> Any:
    def hook(layer: nn.Module, inputs: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = bottleneck(x)
        return y

    return hook
