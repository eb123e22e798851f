"""Singular components and orthogonal parts of a weight, by the short way and by the whole decomposition."""

from __future__ import annotations

import pytest
import torch

from peft_core.methods.lora import starts as lora_starts
from peft_core.methods.lora.starts import largest_components, orthogonal_part, smallest_components


def weight(rows: int, columns: int, *, decay: float) -> torch.Tensor:
    """A random matrix whose singular values fall like index ** -decay."""
    generator = torch.Generator().manual_seed(rows + columns)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator)).Q
    values = torch.arange(1, size + 1) ** -decay
    product: torch.Tensor = (left * values) @ right.T
    return product


@pytest.mark.parametrize("decay", [0.3, 0.7])
@pytest.mark.parametrize("shape", [(1100, 1100), (1060, 1500), (1500, 1060)])
def test_the_short_way_finds_the_largest_components(
    shape: tuple[int, int], decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, rank = weight(*shape, decay=decay), 8
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank]
    monkeypatch.setattr(torch.linalg, "svd", None)  # the whole decomposition is not needed
    found = largest_components(matrix, rank)
    assert (found.down.shape, found.up.shape) == ((rank, shape[1]), (shape[0], rank))
    assert float((found.up.double() @ found.down.double() - expected).abs().max()) < 2e-6


def test_equal_components_are_left_to_the_whole_decomposition() -> None:
    """They cannot be told apart, so the short way gives up."""
    assert lora_starts._in_krylov_space(torch.eye(600, dtype=torch.float64), 8) is None


@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64)])
def test_the_smallest_components_are_the_rest(shape: tuple[int, int]) -> None:
    matrix = weight(*shape, decay=0.2)
    size = min(shape)
    small, large = smallest_components(matrix, 5), largest_components(matrix, size - 5)
    assert torch.allclose(small.up @ small.down + large.up @ large.down, matrix, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64)])
def test_the_orthogonal_part_is_that_of_the_stored_weight(shape: tuple[int, int], transposed: bool) -> None:
    matrix, rank, scaling = weight(*shape, decay=0.2), 6, 1.5
    stored = matrix.T if transposed else matrix
    q, r = torch.linalg.qr(stored)
    expected = scaling * q[:, :rank] @ r[:rank]
    found = orthogonal_part(matrix, rank, scaling, transposed=transposed)
    assert torch.allclose(found.up @ found.down, expected.T if transposed else expected, atol=1e-5)
