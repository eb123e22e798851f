"""Factors of experts as files store them, and the addition to stacked weights that they make.

    stacked, E experts of rank r    lora_A [E * r, in]   row e * r + j       factor j of expert e (expert-major)
                                    lora_B [out, r * E]  column j * E + e    factor j of expert e (rank-major)
    single experts                  lora_A [r, in], lora_B [out, r] of each matrix of each expert

Running example: 8 experts with gate and up projections of 128 outputs, r = 4 each
    ExpertDelta(down [8, 8, 64], up [8, 256, 8]), up[e] = [[gate's, 0], [0, up's]]
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from peft_core.forms import ExpertDelta
from peft_core.methods.lora.expert_names import Factors, SinglePlace, Stack
from peft_core.methods.tensors import TensorSource, read_finite, require_finite


class SingleFactors(NamedTuple):
    """Factors of one matrix of one expert."""

    place: SinglePlace
    factors: Factors
    rank: int
    scaling: float


def joint_rank(many: tuple[SingleFactors, ...]) -> int:
    """The largest sum of ranks of one expert."""
    sums: dict[int, int] = {}
    for one in many:
        sums[one.place.expert] = sums.get(one.place.expert, 0) + one.rank
    return max(sums.values())


def read_stacked(tensors: TensorSource, names: Factors, stack: Stack, scaling: float) -> ExpertDelta:
    """Raises MalformedAdapter where a tensor holds NaN or infinity, or is not what the header announced."""
    down = read_finite(tensors, names.down).view(stack.experts, -1, stack.inputs)
    up = read_finite(tensors, names.up).view(stack.outputs, -1, stack.experts).permute(2, 0, 1) * scaling
    require_finite(up, names.up)
    return ExpertDelta(down, up.contiguous())


def read_single(tensors: TensorSource, many: tuple[SingleFactors, ...], stack: Stack) -> ExpertDelta:
    """As `read_stacked`; experts with fewer ranks, or without factors, are filled up with zeros."""
    rank = joint_rank(many)
    down = torch.zeros(stack.experts, rank, stack.inputs)
    up = torch.zeros(stack.experts, stack.outputs, rank)
    filled = [0] * stack.experts
    for one in many:
        expert, half = one.place.expert, one.place.half
        columns = slice(filled[expert], filled[expert] + one.rank)
        filled[expert] += one.rank
        first = 0 if half is None else half * (stack.outputs // 2)
        values = read_finite(tensors, one.factors.up) * one.scaling
        require_finite(values, one.factors.up)
        down[expert, columns] = read_finite(tensors, one.factors.down)
        up[expert, first : first + len(values), columns] = values
    return ExpertDelta(down, up)
