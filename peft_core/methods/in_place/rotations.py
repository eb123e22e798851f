"""Orthogonal and nearly orthogonal matrices from trained numbers, in blocks.

    skew matrix Q (Q^T = -Q)     from the numbers above its diagonal, or from any square matrix
    Cayley                       (I - Q) (I + Q)^-1, orthogonal
    Cayley-Neumann               I + 2 Q + 2 Q^2 + ... + Q^k, a series broken off; it approaches (I + Q) (I - Q)^-1, the
                                 inverse of the matrix above, and is not quite orthogonal
    butterfly                    a product of block-diagonal matrices, each in another order of the features

Everything takes and gives [blocks, size, size] float32.
"""

from __future__ import annotations

import torch


def skew_from_upper(upper: torch.Tensor, size: int) -> torch.Tensor:
    """upper: [blocks, size * (size - 1) / 2], row after row."""
    rows, columns = torch.triu_indices(size, size, 1)
    matrix = torch.zeros(upper.shape[0], size, size)
    matrix[:, rows, columns] = upper
    return matrix - matrix.transpose(1, 2)


def skew_part(matrix: torch.Tensor) -> torch.Tensor:
    return 0.5 * (matrix - matrix.transpose(1, 2))


def shortened(skew: torch.Tensor, limit: float) -> torch.Tensor:
    """Blocks whose Frobenius norm is above the limit, scaled down to it."""
    norms = skew.norm(dim=(1, 2), keepdim=True)
    return torch.where(norms <= limit, skew, limit * (skew / norms))


def cayley(skew: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(skew.shape[-1]).expand_as(skew)
    solved: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return solved


def cayley_neumann(skew: torch.Tensor, num_terms: int) -> torch.Tensor:
    """The series, the identity counted as a term; its last power stands once where the others stand twice."""
    series = torch.eye(skew.shape[-1]).repeat(skew.shape[0], 1, 1)
    if num_terms == 1:
        return series
    series = series + 2 * skew
    if num_terms == 2:
        return series
    power = skew
    for _ in range(max(1, num_terms - 3)):  # PEFT's series of three terms is that of four
        power = power @ skew
        series = series + 2 * power
    return series + power @ skew


def butterfly(factors: torch.Tensor) -> torch.Tensor:
    """The product of butterfly factors as one block-diagonal matrix of larger blocks.

    Args:
        factors: [num_factors, blocks, size, size], applied in order; factor i mixes features that are up to
            size * 2^i apart. `blocks` is a multiple of 2^(num_factors - 1), and `size` even where there are several.

    Returns:
        [blocks / 2^(num_factors - 1), size * 2^(num_factors - 1), the same]
    """
    num_factors, _, size, _ = factors.shape
    if num_factors == 1:
        return factors[0]
    spread = 2 ** (num_factors - 1)
    product = torch.eye(size * spread)
    for index, factor in enumerate(factors):
        grouped = factor.unflatten(0, (-1, spread))
        wide = torch.stack([torch.block_diag(*blocks) for blocks in grouped])
        order = _butterfly_order(size, index, spread)
        product = wide[:, order][:, :, order] @ product
    return product


def _butterfly_order(size: int, index: int, spread: int) -> torch.Tensor:
    """Where the features of one wide block come from: in each stretch of size * 2^index, even halves before odd."""
    halves = torch.arange(2 ** (index + 1))
    sorted_halves = torch.cat([halves[::2], halves[1::2]])
    within = (sorted_halves[:, None] * (size // 2) + torch.arange(size // 2)).flatten()
    if index == 0:
        within = torch.arange(size)
    stretches: torch.Tensor = torch.arange(spread // 2**index) * (size * 2**index)
    return (stretches[:, None] + within).flatten()
