"""The fast way to the largest values finds the same values as torch's own."""

from __future__ import annotations

import pytest
import torch

from server.engine.top_values import top_values


@pytest.mark.parametrize("width", [1, 15, 16, 17, 300, 4099])
@pytest.mark.parametrize("k", [1, 2, 5, 20, 256, 300])
@pytest.mark.parametrize("kind", ["spread", "tied", "mostly removed", "sorted"])
def test_the_largest_values_equal_those_of_topk(width: int, k: int, kind: str) -> None:
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(k))
    if kind == "tied":
        rows = rows.round()
    if kind == "mostly removed":
        rows[:, torch.arange(width) % 50 != 3] = -torch.inf
    if kind == "sorted":
        rows = rows.sort(-1).values
    count = min(k, width)
    assert torch.equal(top_values(rows, count), rows.topk(count).values)
