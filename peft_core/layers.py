"""The module that stands where a linear of the base model stood.

A linear layer receives nothing but its input, so what the step's adapters are must be ambient:
every layer of one runner holds the same `ActiveBatch`, which the runner fills for the time of
one forward pass.

A group of layers that read the same tensor is computed when its first member is called; the
other members hand out their columns of that result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from peft_core.batch import AdapterBatch, Between, RowAdapters, rows_by_slot
from peft_core.errors import UnsupportedAdapter
from peft_core.hooks.step_hooks import StepHooks
from peft_core.kernels.base_product import BaseProduct
from peft_core.kernels.changes import GroupChange, SiteChanges
from peft_core.residency import Residency
from peft_core.sites import SiteGroup


class AdapterKernels(Protocol):
    """The seam between the layers and what computes on this device (`peft_core.kernels`)."""

    residency: Residency

    def prepare(self, rows: RowAdapters, *, is_head: bool = False) -> Any:
        """Whatever the kernels derive from the triples of one step's token rows or, for the head, last rows.

        Valid until the next call of its kind.
        """

    def apply(
        self, group: SiteGroup, x: torch.Tensor, y: torch.Tensor, prepared: Any, between: Between | None = None
    ) -> None:
        """y[rows, columns] += scale * up (between (down x[rows])), in place, for every triple."""


@dataclass(slots=True)
class _ActiveRows:
    """The adapters of one set of rows."""

    num_rows: int
    prepared: Any
    changes: Mapping[str, GroupChange]  # by leader


class ActiveBatch:
    """The step's adapters, shared by all layers of one runner; empty outside of `use`."""

    def __init__(self, kernels: AdapterKernels) -> None:
        self.kernels = kernels
        self.residency = kernels.residency
        self.hooks: StepHooks | None = None  # set by `attach`
        self._changes = SiteChanges(self.residency)
        self._kept: dict[bool, tuple[Any, Mapping[str, GroupChange]]] = {}  # by is_head: what for, changes
        self._tokens: _ActiveRows | None = None
        self._last: _ActiveRows | None = None
        self._in_use = False
        self._has_virtual = False

    @contextmanager
    def use(self, batch: AdapterBatch) -> Iterator[None]:
        """Let the layers see `batch` until the block ends; not reentrant."""
        assert not self._in_use, "one forward pass at a time"
        self._in_use, self._has_virtual = True, batch.has_virtual
        try:
            self._tokens = self._prepared(batch.tokens, is_head=False)
            self._last = self._prepared(batch.last, is_head=True)
            yield
        finally:
            self._in_use, self._tokens, self._last = False, None, None

    def product(self, group: SiteGroup, base: BaseProduct, x: torch.Tensor) -> torch.Tensor:
        """The base's product with this step's adapters: x [rows, in_features] -> [rows, sum(out_features)].

        Wider at the head where an adapter brings a larger vocabulary; -inf where a row's own has no such token.
        """
        active = self._last if group.is_head else self._tokens
        if active is None:
            return base(x)
        if len(x) != active.num_rows:
            raise UnsupportedAdapter(
                f"{group.leader} was called with {len(x)} rows in a step of {active.num_rows}: the model routes rows "
                "here, so an adapter on this module cannot be applied."
            )
        change = active.changes.get(group.leader)
        if change is None:
            y = base(x)
            self.kernels.apply(group, x, y, active.prepared)
            return y
        y = self._changes.product(group, base, x, change)
        self.kernels.apply(group, x, y[:, : sum(group.out_features)], active.prepared)
        return y.to(x.dtype)

    def _prepared(self, rows: RowAdapters, *, is_head: bool) -> _ActiveRows | None:
        if rows.is_base_only:
            self._forget(is_head=is_head)
            return None
        prepared = self.kernels.prepare(rows, is_head=is_head)
        slots = {*rows.narrow_slots.tolist(), *(segment.slot for segment in rows.wide)}
        rare = {slot for slot in slots if self.residency.has_parts[slot]}
        if not rare:
            self._forget(is_head=is_head)
            return _ActiveRows(rows.num_rows, prepared, {})
        return _ActiveRows(rows.num_rows, prepared, self._rare(rows, rare, is_head=is_head))

    def _rare(self, rows: RowAdapters, slots: set[int], *, is_head: bool) -> Mapping[str, GroupChange]:
        """Changes and hooks of the adapters in `slots`, made again only when the batch's members changed."""
        epochs = tuple(self.residency.epochs[sorted(slots)].tolist())
        key = (
            rows.num_rows,
            rows.narrow_rows.tobytes(),
            rows.narrow_slots.tobytes(),
            rows.wide,
            epochs,
            self._has_virtual,
        )
        kept = self._kept.get(is_head)
        if kept is not None and kept[0] == key:
            return kept[1]
        self._forget(is_head=is_head)
        parts = rows_by_slot(rows, slots)
        changes = self._changes.prepare(parts, is_head=is_head)
        if not is_head:
            assert self.hooks is not None, "attach the base before adapters act on it"
            self.hooks.install(parts, rows.num_rows, self._add_products, has_virtual=self._has_virtual)
        self._kept[is_head] = (key, changes)
        return changes

    def _add_products(self, group: SiteGroup, u: torch.Tensor, y: torch.Tensor, between: Between) -> None:
        assert self._tokens is not None
        self.kernels.apply(group, u, y, self._tokens.prepared, between)

    def _forget(self, *, is_head: bool) -> None:
        if self._kept.pop(is_head, None) is not None and not is_head and self.hooks is not None:
            self.hooks.remove()


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
        y = self._active.product(self.group, self.base, x.reshape(-1, x.shape[-1]))
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
