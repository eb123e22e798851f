"""Whatever is low-rank in the end, as plain LoRA that needs no base any more.

PiSSA and OLoRA, for example, take a part of the base away when training begins. On the untouched base such an adapter
is a LoRA of twice the rank: one half adds what was trained, the other takes the part away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from peft_core.forms import AdapterForms
from server.convert.errors import ConversionRefused

_PREFIX = "base_model.model."


def plain_lora(
    config: Mapping[str, Any], forms: AdapterForms, kind: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of a LoRA with these forms, its scalings all 1.

    Raises:
        ConversionRefused: some of the forms are not low-rank.
    """
    if forms != AdapterForms(linear=forms.linear) or not forms.linear:
        raise ConversionRefused(
            f"this {kind} adapter is more than a low-rank addition, so no plain LoRA equals it. "
            "It can be served as it is: convert it without --base."
        )
    ranks = {path: delta.rank for path, delta in forms.linear.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {re.escape(path): own for path, own in ranks.items() if own != rank}
    tensors: dict[str, torch.Tensor] = {}
    for path, delta in forms.linear.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = delta.down.float().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = delta.up.float().contiguous()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "bias": "none",
        "target_modules": sorted(forms.linear),
    }, tensors
