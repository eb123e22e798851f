"""Adapters of several kinds for the benchmarks' base, as the library of each saves them; weights random, none zero.

    LoRA          rank 16 on all seven projections             PEFT
    DoRA, PiSSA   the same, with what else they store          PEFT; decoded with weights of the base
    IA3           gains on keys, values and feed-forward       PEFT
    prefix        32 tokens in every layer                     PEFT, prefix tuning
    bottleneck    after attention and feed-forward, 1/16 wide  AdapterHub, double_seq_bn

Running example, under the cache directory:
    qwen2-512x12-v32000-adapters/prefix-7/     adapter 7 of its kind
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.models import BaseShape, adapter_directory
from bench.workloads import AdapterShape

KINDS = ("LoRA", "IA3", "prefix", "bottleneck")
KINDS_WITH_BASE = ("DoRA", "PiSSA")
RANK = 16
NUM_VIRTUAL = 32
REDUCTION = 16  # hidden size over bottleneck

_Draw = Callable[..., torch.Tensor]
_Named = Iterator[tuple[str, torch.Tensor]]


def kind_directory(shape: BaseShape, kind: str, number: int, cache: Path) -> Path:
    """One adapter of a kind, made at the first call; another number is other weights."""
    if kind == "LoRA":
        return adapter_directory(shape, AdapterShape(RANK), number, cache)
    directory = cache / f"{shape.name}-adapters" / f"{kind.lower()}-{number}"
    if (directory / "adapter_config.json").exists():
        return directory
    generator = torch.Generator().manual_seed(5000 + number)

    def draw(*sizes: int, spread: float) -> torch.Tensor:
        return torch.randn(sizes, generator=generator) * spread

    config, tensors = _MAKERS[kind](shape, draw)
    weights = "adapter.safetensors" if kind == "bottleneck" else "adapter_model.safetensors"
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / weights, metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return directory


def _low_rank(shape: BaseShape, draw: _Draw) -> _Named:
    for path, inputs, outputs in _linears(shape):
        yield f"{path}.lora_A.weight", draw(RANK, inputs, spread=inputs**-0.5)
        yield f"{path}.lora_B.weight", draw(outputs, RANK, spread=0.1 * RANK**-0.5)


def _dora(shape: BaseShape, draw: _Draw) -> tuple[Mapping[str, Any], _Named]:
    def tensors() -> _Named:
        yield from _low_rank(shape, draw)
        for path, inputs, outputs in _linears(shape):  # near the norms of the base's rows, whose spread is 0.02
            yield f"{path}.lora_magnitude_vector", 0.02 * inputs**0.5 * (1 + draw(outputs, spread=0.1))

    return _lora_config(shape, use_dora=True), tensors()


def _pissa(shape: BaseShape, draw: _Draw) -> tuple[Mapping[str, Any], _Named]:
    return _lora_config(shape, init_lora_weights="pissa"), _low_rank(shape, draw)


def _ia3(shape: BaseShape, draw: _Draw) -> tuple[Mapping[str, Any], _Named]:
    def tensors() -> _Named:
        for path, inputs, outputs in _linears(shape):
            if path.endswith(("k_proj", "v_proj")):
                yield f"{path}.ia3_l", 1 + draw(outputs, 1, spread=0.2)
            elif path.endswith("down_proj"):
                yield f"{path}.ia3_l", 1 + draw(1, inputs, spread=0.2)

    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return {"peft_type": "IA3", **_common(shape), **targets, "fan_in_fan_out": False}, tensors()


def _prefix(shape: BaseShape, draw: _Draw) -> tuple[Mapping[str, Any], _Named]:
    width = shape.hidden // shape.heads * shape.kv_heads
    config = {
        "peft_type": "PREFIX_TUNING",
        **_common(shape),
        "num_virtual_tokens": NUM_VIRTUAL,
        "num_layers": shape.layers,
        "num_attention_heads": shape.kv_heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    values = draw(NUM_VIRTUAL, shape.layers * 2 * width, spread=0.5)
    return config, iter([("prompt_embeddings", values)])


def _bottleneck(shape: BaseShape, draw: _Draw) -> tuple[Mapping[str, Any], _Named]:
    width = max(1, shape.hidden // REDUCTION)

    def tensors() -> _Named:
        for layer in range(shape.layers):
            for place in ("attention_adapters", "output_adapters"):
                prefix = f"model.layers.{layer}.{place}.adapters.bench"
                yield f"{prefix}.adapter_down.0.weight", draw(width, shape.hidden, spread=shape.hidden**-0.5)
                yield f"{prefix}.adapter_down.0.bias", draw(width, spread=0.1)
                yield f"{prefix}.adapter_up.weight", draw(shape.hidden, width, spread=0.1 * width**-0.5)
                yield f"{prefix}.adapter_up.bias", draw(shape.hidden, spread=0.01)

    method = {
        "mh_adapter": True,
        "output_adapter": True,
        "reduction_factor": REDUCTION,
        "non_linearity": "swish",
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "ln_before": False,
        "ln_after": False,
        "is_parallel": False,
        "scaling": 1.0,
        "leave_out": [],
        "use_gating": False,
    }
    config = {
        "config": method,
        "hidden_size": shape.hidden,
        "model_class": "Qwen2ForCausalLM",
        "model_name": shape.name,
        "model_type": "qwen2",
        "name": "bench",
        "version": "adapters.1.3.0",
    }
    return config, tensors()


_MAKERS: Mapping[str, Callable[[BaseShape, _Draw], tuple[Mapping[str, Any], _Named]]] = {
    "DoRA": _dora,
    "PiSSA": _pissa,
    "IA3": _ia3,
    "prefix": _prefix,
    "bottleneck": _bottleneck,
}


def _linears(shape: BaseShape) -> Iterator[tuple[str, int, int]]:
    """Prefix of the names of tensors, inputs, outputs."""
    for layer in range(shape.layers):
        for path, inputs, outputs in shape.projections().values():
            yield f"base_model.model.model.layers.{layer}.{path}", inputs, outputs


def _lora_config(shape: BaseShape, **more: Any) -> Mapping[str, Any]:
    sizes = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "bias": "none"}
    return {"peft_type": "LORA", **_common(shape), **sizes, "target_modules": list(shape.projections()), **more}


def _common(shape: BaseShape) -> Mapping[str, Any]:
    return {"task_type": "CAUSAL_LM", "base_model_name_or_path": shape.name, "inference_mode": True}
