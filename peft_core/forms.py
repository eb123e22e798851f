"""What an adapter is, once its kind is forgotten.

Decoders (`peft_core.methods`) turn the files of one kind into these forms; everything
behind them (packing, residency, kernels, the engine) knows forms only, never kinds.

    linear site:  y = base(x) + up (down x)

Running example: rank 16 on `model.layers.0.self_attn.q_proj` of a base with hidden size 512
    down = A            [16, 512]
    up   = scaling * B  [512, 16]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LinearDelta:
    """A low-rank addition to the output of one linear module.

    Semantics:
        y += up @ (down @ x)
    """

    down: torch.Tensor  # [rank, in_features], any float dtype, host
    up: torch.Tensor  # [out_features, rank], the scaling folded in, host

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterForms:
    """All forms of one adapter, keyed by the path of the base model's module."""

    linear: Mapping[str, LinearDelta]
