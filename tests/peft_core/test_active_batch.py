"""The step's adapters are there for one forward pass and gone after it, whatever happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from peft_core.batch import AdapterBatch, Between, RowAdapters
from peft_core.layers import ActiveBatch
from peft_core.residency import Residency
from peft_core.sites import SiteGroup

GROUP = SiteGroup(("a",), 4, (4,))
EMPTY = {"dtype": "float32", "up_tile": 8, "num_bytes": 0, "sites": [], "parts": []}


class CountingKernels:
    """Adds one to every row; the first `num_failures` preparations run out of memory."""

    def __init__(self, num_failures: int = 0) -> None:
        self.num_failures = num_failures
        self.residency = Residency(torch.zeros(1024, dtype=torch.uint8), (GROUP,), 8, "float32")
        self.residency.bind(0, EMPTY, 0)

    def prepare(self, rows: RowAdapters, *, is_head: bool = False) -> Any:
        if self.num_failures:
            self.num_failures -= 1
            raise MemoryError

    def apply(
        self, group: SiteGroup, x: torch.Tensor, y: torch.Tensor, prepared: Any, between: Between | None = None
    ) -> None:
        y += 1


class ZeroProduct:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    def weight(self, member: int) -> torch.Tensor:
        raise AssertionError("nobody reads it here")

    def bias(self, member: int) -> torch.Tensor | None:
        return None


base = ZeroProduct()


def batch() -> AdapterBatch:
    rows = RowAdapters(2, np.arange(2), np.zeros(2, np.int64), np.ones(2, np.float32))
    return AdapterBatch(rows, rows)


def test_outside_of_a_step_nothing_is_added() -> None:
    active, x = ActiveBatch(CountingKernels()), torch.zeros(2, 4)
    with active.use(batch()):
        assert torch.equal(active.product(GROUP, base, x), torch.ones(2, 4))
    assert torch.equal(active.product(GROUP, base, x), torch.zeros(2, 4))


def test_a_step_that_could_not_be_prepared_is_followed_by_good_ones() -> None:
    active = ActiveBatch(CountingKernels(num_failures=1))
    with pytest.raises(MemoryError), active.use(batch()):
        pass
    with active.use(batch()):
        assert torch.equal(active.product(GROUP, base, torch.zeros(2, 4)), torch.ones(2, 4))


def test_one_forward_pass_at_a_time() -> None:
    active = ActiveBatch(CountingKernels())
    with active.use(batch()), pytest.raises(AssertionError, match="one forward pass"), active.use(batch()):
        pass
