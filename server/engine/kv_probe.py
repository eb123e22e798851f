"""What K and V look like, found by letting the model call an attention that only looks.

Configurations name these sizes in many ways, and some name them wrongly; what a layer hands to its
attention is the truth.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from server.engine.errors import EngineStartError
from server.engine.kv_cache import KVShape

NAME = "veneer_probe"


def probe_kv_shape(model: Any, block_size: int) -> KVShape:
    """Sizes of one K/V block; the model's attention implementation is put back afterwards.

    Raises:
        EngineStartError: the layers do not all attend once with K and V of one size.
    """
    seen: list[tuple[int, torch.Size, torch.Size]] = []
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False, probe=seen)
    finally:
        model.set_attn_implementation(before)
    num_layers = model.config.get_text_config().num_hidden_layers
    layers = sorted(layer for layer, _, _ in seen)
    shapes = {shape for _, key, value in seen for shape in (key, value)}
    if layers != list(range(num_layers)) or len(shapes) != 1:
        raise EngineStartError(
            f"{model.config.model_type} does not keep plain K and V in every layer (layers that attend: {layers} of "
            f"{num_layers}; sizes: {sorted(tuple(shape) for shape in shapes)}), so its cache cannot be paged."
        )
    _, num_kv_heads, _, head_dim = shapes.pop()
    return KVShape(num_layers, num_kv_heads, head_dim, block_size, model.dtype)


def _look(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    probe: list[tuple[int, torch.Size, torch.Size]] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if probe is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        probe.append((layer, key.shape, value.shape))
    return torch.zeros_like(query.transpose(1, 2)), None


AttentionInterface.register(NAME, _look)
