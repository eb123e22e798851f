"""What K and V look like, found by letting the model call an attention that only looks.

Configurations name these sizes in many ways, and some name them wrongly; what a layer hands to its
attention is the truth. A few models tell the window of their sliding layers only to the mask that
they make for attentions of transformers' own; ours would never hear of it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface

from server.engine.errors import EngineStartError
from server.engine.kv_cache import KVShape

NAME = "veneer_probe"


class _Look(NamedTuple):
    layer: int
    key: torch.Size
    value: torch.Size
    window: int | None  # tokens


def probe_kv_shape(model: Any, block_size: int, max_length: int) -> KVShape:
    """Sizes of one K/V block; the model's attention implementation is put back afterwards.

    Raises:
        EngineStartError: the layers do not all attend once with K and V of one size, or one that slides over less
            than `max_length` tokens does not say so.
    """
    seen: list[_Look] = []
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False, probe=seen)
    finally:
        model.set_attn_implementation(before)
    text_config = model.config.get_text_config()
    num_layers = text_config.num_hidden_layers
    layers = sorted(look.layer for look in seen)
    shapes = {shape for look in seen for shape in (look.key, look.value)}
    if layers != list(range(num_layers)) or len(shapes) != 1:
        raise EngineStartError(
            f"{model.config.model_type} does not keep plain K and V in every layer (layers that attend: {layers} of "
            f"{num_layers}; sizes: {sorted(tuple(shape) for shape in shapes)}), so its cache cannot be paged."
        )
    silent = [look.layer for look in seen if look.window is None and _window(text_config, look.layer) < max_length]
    if silent:
        raise EngineStartError(
            f"{model.config.model_type} slides over {text_config.sliding_window} tokens in layers {silent} and does "
            "not tell its attention: longer sequences would be answered wrongly. Give --max-model-len "
            f"{text_config.sliding_window} or less."
        )
    _, num_kv_heads, _, head_dim = shapes.pop()
    return KVShape(num_layers, num_kv_heads, head_dim, block_size, model.dtype)


def _window(text_config: Any, layer: int) -> float:
    """Tokens that the configuration lets a layer look back over."""
    kinds = getattr(text_config, "layer_types", None)
    is_sliding = kinds is None or kinds[layer] == "sliding_attention"
    return (is_sliding and getattr(text_config, "sliding_window", None)) or math.inf


def _look(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    probe: list[_Look] | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if probe is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        probe.append(_Look(layer, key.shape, value.shape, sliding_window))
    return torch.zeros_like(query.transpose(1, 2)), None


AttentionInterface.register(NAME, _look)
