"""What some initialisations of LoRA took out of the base's weights before training, as two factors.

    PiSSA   the r largest singular components of W                 (https://arxiv.org/abs/2404.02948)
    OLoRA   scaling * Q[:, :r] R[:r], where Q R is the stored W    (https://arxiv.org/abs/2406.01775)
    KaSA    the r smallest singular components of W                (https://arxiv.org/abs/2412.06071)

An adapter of this kind was trained on W - up down. Here the base is shared and never changed, so the two factors stand
beside the trained ones with their sign turned: a low-rank addition of rank 2r.

The largest components of a large weight are found in a block Krylov space (https://arxiv.org/abs/1504.05477), which
costs a few products with W instead of a whole decomposition; where it does not converge, the whole one is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_WHOLE = 1024  # up to this size a whole decomposition is quick
_EXTRA = 8  # columns of a block beyond the wanted ones
_STEPS_A_LOOK = 4
_TOLERANCE = 1e-6  # of the product, relative to the largest singular value


class Removed(NamedTuple):
    down: torch.Tensor  # [rank, in_features]
    up: torch.Tensor  # [out_features, rank]


def largest_components(weight: torch.Tensor, rank: int) -> Removed:
    """The largest singular components of a weight [out, in]."""
    if min(weight.shape) > max(_WHOLE, 8 * rank):
        found = _in_krylov_space(weight.double(), rank)
        if found is not None:
            return found
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return Removed(v[:rank].contiguous(), u[:, :rank] * s[:rank])


def smallest_components(weight: torch.Tensor, rank: int) -> Removed:
    """The smallest singular components of a weight [out, in]."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return Removed(v[-rank:].contiguous(), u[:, -rank:] * s[-rank:])


def orthogonal_part(weight: torch.Tensor, rank: int, scaling: float, *, transposed: bool) -> Removed:
    """The first columns of the QR decomposition of a weight [out, in], as it is stored ([in, out] if transposed).

    They are the decomposition of the weight's first columns, and R their products with the whole weight.
    """
    stored = weight.T if transposed else weight
    q = torch.linalg.qr(stored[:, :rank]).Q
    first, second = q, scaling * (q.T @ stored)
    down, up = (first.T, second.T) if transposed else (second, first)
    return Removed(down.contiguous(), up.contiguous())


def _in_krylov_space(weight: torch.Tensor, rank: int) -> Removed | None:
    """The largest components of a float64 weight; None where they cannot be told from the next ones in time."""
    generator = torch.Generator().manual_seed(0)
    size = rank + _EXTRA
    block = torch.linalg.qr(weight @ torch.randn(weight.shape[1], size, generator=generator, dtype=torch.float64)).Q
    basis = block
    while basis.shape[1] + _STEPS_A_LOOK * size <= min(weight.shape) // 4:
        for _ in range(_STEPS_A_LOOK):
            block = weight @ (weight.T @ block)
            for _ in range(2):  # once leaves rounding errors behind
                block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block).Q
            basis = torch.cat([basis, block], dim=1)
        inside = basis.T @ weight
        squares, vectors = torch.linalg.eigh(inside @ inside.T)  # ascending
        up = basis @ vectors[:, -rank:]
        down = up.T @ weight
        if _has_converged(weight, up, down, squares, rank):
            return Removed(down.float().contiguous(), up.float().contiguous())
    return None


def _has_converged(
    weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, squares: torch.Tensor, rank: int
) -> bool:
    """Whether what the found directions lack changes the product by less than the tolerance.

    They are off by an angle of at most residual / gap, the distance to the squares of the components left out.
    """
    residual = (weight @ down.T - up * squares[-rank:]).norm()
    return bool(residual <= _TOLERANCE * (squares[-rank] - squares[-rank - 1]))
