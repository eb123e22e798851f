"""The module that stands where a linear of the base model stood.

A linear layer receives nothing but its input, so what the step's adapters are must be ambient:
every layer of one runner holds the same `ActiveBatch`, which the runner fills for the time of
one forward pass.

A group of layers that read the same tensor is computed when its first member is called; the
other members hand out their columns of that result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from peft_core.batch import AdapterBatch, RowAdapters
from peft_core.errors import UnsupportedAdapter
from peft_core.kernels.base_product import BaseProduct
from peft_core.sites import SiteGroup


class AdapterKernels(Protocol):
    """The seam between the layers and what computes on this device (`peft_core.kernels`)."""

    def prepare(self, rows: RowAdapters, *, is_head: bool = False) -> Any:
        """Whatever the kernels derive from the triples of one step's token rows or, for the head, last rows.

        Valid until the next call of its kind.
        """

    def apply(self, group: SiteGroup, x: torch.Tensor, y: torch.Tensor, prepared: Any) -> None:
        """y[rows, columns] += scale * up (down x[rows]), in place, for every triple."""


class ActiveBatch:
    """The step's adapters, shared by all layers of one runner; empty outside of `use`."""

    def __init__(self, kernels: AdapterKernels) -> None:
        self.kernels = kernels
        self._tokens: tuple[int, Any] | None = None  # (rows, prepared)
        self._last: tuple[int, Any] | None = None
        self._in_use = False

    @contextmanager
    def use(self, batch: AdapterBatch) -> Iterator[None]:
        """Let the layers see `batch` until the block ends; not reentrant."""
        assert not self._in_use, "one forward pass at a time"
        self._in_use = True
        try:
            self._tokens = self._prepared(batch.tokens, is_head=False)
            self._last = self._prepared(batch.last, is_head=True)
            yield
        finally:
            self._in_use, self._tokens, self._last = False, None, None

    def add_to(self, group: SiteGroup, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the step's adapters at one group: x [rows, in_features], y [rows, sum(out_features)]."""
        active = self._last if group.is_head else self._tokens
        if active is None:
            return
        num_rows, prepared = active
        if len(x) != num_rows:
            raise UnsupportedAdapter(
                f"{group.leader} was called with {len(x)} rows in a step of {num_rows}: the model routes rows here, "
                "so an adapter on this module cannot be applied."
            )
        self.kernels.apply(group, x, y, prepared)

    def _prepared(self, rows: RowAdapters, *, is_head: bool) -> tuple[int, Any] | None:
        return None if rows.is_base_only else (rows.num_rows, self.kernels.prepare(rows, is_head=is_head))


class GroupProduct:
    """Base product plus adapters of one group; remembers its last result until all members took theirs."""

    def __init__(self, group: SiteGroup, base: BaseProduct, active: ActiveBatch) -> None:
        self.group, self.base, self._active = group, base, active
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._waiting = 0

    def member(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The columns of one member: [..., out_features]. Not contiguous when the group has several."""
        if len(self.group.paths) == 1:
            return self._compute(x)
        if x is not self._input:
            self._input, self._output, self._waiting = x, self._compute(x), len(self.group.paths)
        assert self._output is not None
        first, last = self.group.columns[index]
        columns = self._output[..., first:last]
        self._waiting -= 1
        if not self._waiting:
            self._input = self._output = None
        return columns

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        self._active.add_to(self.group, rows, y)
        return y.view(*x.shape[:-1], y.shape[-1])


class AdaptedLinear(nn.Module):
    """Stands for one linear module of the base. `weight` and `bias` are passed through, because some models
    read them directly; a packed weight is unpacked for each such read.
    """

    def __init__(self, product: GroupProduct, index: int) -> None:
        super().__init__()
        self.product, self.index = product, index
        self.in_features = product.group.in_features
        self.out_features = product.group.out_features[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.member(self.index, x)

    @property
    def weight(self) -> torch.Tensor:
        return self.product.base.weight(self.index)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.product.base.bias(self.index)

    def extra_repr(self) -> str:
        kind = type(self.product.base).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, base={kind}"
