"""MLX adapters as PEFT ones.

    mlx     model.layers.0.self_attn.q_proj.lora_a [in, r]     y += scale * (x lora_a) lora_b
            model.layers.0.self_attn.q_proj.lora_b [r, out]
    peft    base_model.model.<path>.lora_A.weight  [r, in]     y += alpha / r * lora_B (lora_A x)

MLX multiplies with `scale` as it is, so alpha = scale * r. Its layers are the model's, by number, so nothing is
renamed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from server.convert.errors import ConversionRefused

_PREFIX = "base_model.model."
_DEFAULT_SCALE = 20.0
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings")


class PeftAdapter(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def is_mlx(config: Mapping[str, Any]) -> bool:
    return "fine_tune_type" in config or "lora_parameters" in config


def from_mlx(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> PeftAdapter:
    """Raises ConversionRefused, naming what cannot be converted."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ConversionRefused(f'"fine_tune_type" is {kind!r}: a whole model, not an adapter. Serve it as one.')
    scale = _scale(config)
    modules = _modules(tensors, is_dora=kind == "dora")
    ranks = {path: parts["lora_a"].shape[1] for path, parts in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: own for path, own in ranks.items() if own != rank}
    made: dict[str, torch.Tensor] = {}
    for path, parts in modules.items():
        made |= _peft_tensors(path, parts, is_dora=kind == "dora")
    base = config.get("model")
    return PeftAdapter(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base if isinstance(base, str) else None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": scale * rank,
            "rank_pattern": {re.escape(path): own for path, own in others.items()},
            "alpha_pattern": {re.escape(path): scale * own for path, own in others.items()},
            "use_dora": kind == "dora",
            "bias": "none",
            "target_modules": sorted(modules),
        },
        made,
    )


def _scale(config: Mapping[str, Any]) -> float:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale", _DEFAULT_SCALE) if isinstance(parameters, Mapping) else _DEFAULT_SCALE
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ConversionRefused(f'"lora_parameters.scale" is {scale!r}, which is no number.')
    return float(scale)


def _modules(tensors: Mapping[str, torch.Tensor], *, is_dora: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Path -> its parts. Every tensor belongs to one."""
    known = ("lora_a", "lora_b", "m") if is_dora else ("lora_a", "lora_b")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        path, _, part = name.rpartition(".")
        if part not in known or not path:
            raise ConversionRefused(f'tensor "{name}" is not a part of an MLX adapter of this kind.')
        modules.setdefault(path, {})[part] = value
    if not modules:
        raise ConversionRefused("the file holds no tensor.")
    for path, parts in modules.items():
        missing = [part for part in known if part not in parts]
        if missing:
            raise ConversionRefused(f'module "{path}" lacks {missing[0]}; the file is incomplete.')
        _check_shapes(path, parts)
    return modules


def _check_shapes(path: str, parts: Mapping[str, torch.Tensor]) -> None:
    down, up = parts["lora_a"], parts["lora_b"]
    if down.dim() == 3:
        raise ConversionRefused(f'module "{path}" holds a matrix for each expert, which is not converted yet.')
    if down.dim() != 2 or up.dim() != 2 or down.shape[1] != up.shape[0]:
        raise ConversionRefused(f'module "{path}" has lora_a {list(down.shape)} and lora_b {list(up.shape)}.')
    if "m" in parts and path.endswith(_EMBEDDINGS):
        raise ConversionRefused(f'"{path}" is an embedding with a magnitude (DoRA), which is not converted.')


def _peft_tensors(path: str, parts: Mapping[str, torch.Tensor], *, is_dora: bool) -> dict[str, torch.Tensor]:
    names = ("lora_A.weight", "lora_B.weight")
    if path.endswith(_EMBEDDINGS):
        names = ("lora_embedding_A", "lora_embedding_B")
    made = {
        f"{_PREFIX}{path}.{names[0]}": parts["lora_a"].T.contiguous(),
        f"{_PREFIX}{path}.{names[1]}": parts["lora_b"].T.contiguous(),
    }
    if is_dora:
        made[f"{_PREFIX}{path}.lora_magnitude_vector"] = parts["m"].reshape(-1).contiguous()
    return made
