"""What some initialisations of LoRA took out of the base's weights before training, as two factors.

    PiSSA   the r largest singular components of W                 (https://arxiv.org/abs/2404.02948)
    OLoRA   scaling * Q[:, :r] R[:r], where Q R is the stored W    (https://arxiv.org/abs/2406.01775)
    KaSA    the r smallest singular components of W                (https://arxiv.org/abs/2412.06071)

An adapter of this kind was trained on W - up down. Here the base is shared and never changed, so the two factors stand
beside the trained ones with their sign turned: a low-rank addition of rank 2r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Removed(NamedTuple):
    down: torch.Tensor  # [rank, in_features]
    up: torch.Tensor  # [out_features, rank]


def largest_components(weight: torch.Tensor, rank: int) -> Removed:
    """The largest singular components of a weight [out, in]."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return Removed(v[:rank].contiguous(), u[:, :rank] * s[:rank])


def smallest_components(weight: torch.Tensor, rank: int) -> Removed:
    """The smallest singular components of a weight [out, in]."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return Removed(v[-rank:].contiguous(), u[:, -rank:] * s[-rank:])


def orthogonal_part(weight: torch.Tensor, rank: int, scaling: float, *, transposed: bool) -> Removed:
    """The first columns of the QR decomposition of a weight [out, in], as it is stored ([in, out] if transposed)."""
    q, r = torch.linalg.qr(weight.T if transposed else weight)
    first, second = q[:, :rank], scaling * r[:rank]
    down, up = (first.T, second.T) if transposed else (second, first)
    return Removed(down.contiguous(), up.contiguous())
