"""What adapters do at a linear site beside the low-rank addition (`peft_core.forms.SiteChange`), for a group of sites.

Gains and shifts are laid out by row, one multiplication or addition for all adapters of the step together. Changed
inputs are stacked below the unchanged ones, so that the base's weights are still read once. Matrices (rotations, dense
and Kronecker products, replaced weights) are multiplied adapter by adapter, so that a row has the same bits whatever
the number of rows (`peft_core.kernels.invariance`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, pad

from peft_core.batch import SlotRows
from peft_core.forms import AdapterForms, HeadRows, SiteChange
from peft_core.kernels.base_product import BaseProduct
from peft_core.kernels.invariance import invariant_product, padded_rows
from peft_core.kernels.vectors import Vectors, add, multiply, row_index, vectors_by_row
from peft_core.residency import Residency
from peft_core.sites import SiteGroup

Rows = slice | torch.Tensor


@dataclass(frozen=True, slots=True)
class _MemberChange:
    """One adapter's change at one member of the group."""

    member: int
    rows: Rows
    change: SiteChange


@dataclass(frozen=True, slots=True)
class _ReplacedRows:
    """One adapter's rows of the head."""

    rows: Rows
    token_ids: torch.Tensor  # [n] int64, on the device
    weights: torch.Tensor  # [n, in_features]


@dataclass(frozen=True, slots=True)
class GroupChange:
    """Everything that this step's adapters change at one group."""

    inputs: tuple[tuple[int, Vectors], ...]  # (member, input gains by row)
    rotations: tuple[_MemberChange, ...]
    gains: tuple[Vectors, ...]  # [rows, sum(out_features)]
    shifts: tuple[Vectors, ...]
    products: tuple[_MemberChange, ...]  # replacement, turn, dense, kron
    head_rows: tuple[_ReplacedRows, ...]
    width: int  # outputs; more than the group's where an adapter brings a larger vocabulary


class SiteChanges:
    """Changes of all resident adapters. `prepare` once for a set of rows, `product` once a group."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency

    def prepare(self, parts: Sequence[SlotRows], *, is_head: bool) -> Mapping[str, GroupChange]:
        """By the leader of each group that any of the adapters changes."""
        forms = {part.slot: self.residency.parts(part.slot) for part in parts}
        touched = {path for one in forms.values() for path in (*one.changes, *one.head_rows)}
        groups = (group for group in self.residency.groups if group.is_head == is_head and not group.is_block)
        return {
            group.leader: self._group(group, parts, forms) for group in groups if not touched.isdisjoint(group.paths)
        }

    def _group(self, group: SiteGroup, parts: Sequence[SlotRows], forms: Mapping[int, AdapterForms]) -> GroupChange:
        device = self.residency.elements.device
        members = [
            _MemberChange(member, row_index(part.rows, device), forms[part.slot].changes[path])
            for part in parts
            for member, path in enumerate(group.paths)
            if path in forms[part.slot].changes
        ]
        heads = [
            _replaced_rows(row_index(part.rows, device), forms[part.slot].head_rows[group.leader], device)
            for part in parts
            if group.leader in forms[part.slot].head_rows
        ]

        def joined(name: str, neutral: float) -> Callable[[int], torch.Tensor | None]:
            return lambda slot: _joined(forms[slot], group, name, neutral)

        def input_gain(path: str) -> Callable[[int], torch.Tensor | None]:
            return lambda slot: forms[slot].changes[path].input_gain if path in forms[slot].changes else None

        gains = [(index, vectors_by_row(parts, input_gain(path), device)) for index, path in enumerate(group.paths)]
        return GroupChange(
            inputs=tuple((index, vectors) for index, of_member in gains for vectors in of_member),
            rotations=tuple(one for one in members if one.change.rotation is not None),
            gains=vectors_by_row(parts, joined("gain", 1.0), device),
            shifts=vectors_by_row(parts, joined("shift", 0.0), device),
            products=tuple(one for one in members if _has_product(one.change)),
            head_rows=tuple(heads),
            width=_width(group, members, heads),
        )

    def product(self, group: SiteGroup, base: BaseProduct, x: torch.Tensor, change: GroupChange) -> torch.Tensor:
        """The base's product with everything changed but the low-rank addition.

        x: [rows, in_features]. Returns [rows, change.width] in the wider of x's and the adapters' dtype.
        """
        y = self._base(group, base, x, change)
        dtype = torch.promote_types(y.dtype, self.residency.dtype)
        if change.width > y.shape[1]:
            y = pad(y, (0, change.width - y.shape[1]), value=-torch.inf)
        y = y.to(dtype)
        wide_x = x.to(dtype)
        for one in change.products:
            if one.change.replacement is not None:
                _replace(y, wide_x, group, base, one)
        for gain in change.gains:
            multiply(y, gain)
        for one in change.products:
            _add_products(y, wide_x, group, one)
        for shift in change.shifts:
            add(y, shift)
        for head in change.head_rows:
            _replace_rows(y, wide_x, base, head)
        return y

    def _base(self, group: SiteGroup, base: BaseProduct, x: torch.Tensor, change: GroupChange) -> torch.Tensor:
        """The base's product, each member's columns from the member's own inputs."""
        if not change.inputs and not change.rotations:
            return base(x)
        dtype = torch.promote_types(x.dtype, self.residency.dtype)
        changed = [(member, vectors.rows, x[vectors.rows].to(dtype) * vectors.values)
                   for member, vectors in change.inputs]  # fmt: skip
        changed += [(one.member, one.rows, _rotated(x[one.rows].to(dtype), one.change)) for one in change.rotations]
        if len(group.paths) == 1:
            own = x.clone()
            for _, rows, inputs in changed:
                own[rows] = inputs.to(x.dtype)
            return base(own)
        y = base(torch.cat([x, *(inputs.to(x.dtype) for _, _, inputs in changed)]))
        result, first = y[: len(x)], len(x)
        for member, rows, inputs in changed:
            start, end = group.columns[member]
            result[rows, start:end] = y[first : first + len(inputs), start:end]
            first += len(inputs)
        return result


def _rotated(x: torch.Tensor, change: SiteChange) -> torch.Tensor:
    """x: [rows, in_features]."""
    assert change.rotation is not None
    blocks, size, _ = change.rotation.shape
    rotation = change.rotation.to(x.dtype)
    split = padded_rows(x).view(-1, blocks, size).transpose(0, 1)
    return torch.bmm(split, rotation).transpose(0, 1).reshape(-1, blocks * size)[: len(x)]


def _joined(forms: AdapterForms, group: SiteGroup, name: str, neutral: float) -> torch.Tensor | None:
    """One vector over the outputs of all members; None where no member has one."""
    own = [getattr(forms.changes[path], name) if path in forms.changes else None for path in group.paths]
    given = next((vector for vector in own if vector is not None), None)
    if given is None:
        return None
    pairs = zip(own, group.out_features, strict=True)
    return torch.cat([given.new_full((out,), neutral) if vector is None else vector for vector, out in pairs])


def _has_product(change: SiteChange) -> bool:
    parts = (change.replacement, change.cos, change.dense, change.kron_left)
    return any(part is not None for part in parts)


def _width(group: SiteGroup, members: Sequence[_MemberChange], heads: Sequence[_ReplacedRows]) -> int:
    """Of the group's outputs, or of the largest vocabulary that an adapter brings to the head."""
    widths = [sum(group.out_features)]
    if group.is_head:
        widths += [len(one.change.replacement) for one in members if one.change.replacement is not None]
        widths += [int(head.token_ids.max()) + 1 for head in heads]
    return max(widths)


def _replace(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, base: BaseProduct, one: _MemberChange) -> None:
    weight = one.change.replacement
    assert weight is not None
    start = group.columns[one.member][0]
    bias = base.bias(one.member)
    if bias is not None:
        bias = pad(bias, (0, len(weight) - len(bias))).to(x.dtype)
    y[one.rows, start : start + len(weight)] = invariant_product(x[one.rows], weight.to(x.dtype), bias).to(y.dtype)


def _add_products(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, one: _MemberChange) -> None:
    change, (start, end) = one.change, group.columns[one.member]
    if change.cos is not None and change.sin is not None:
        z = y[one.rows, start:end]
        y[one.rows, start:end] = change.cos * z + change.sin * _turned(z, change.turn_group)
    if change.dense is not None:
        y[one.rows, start:end] += invariant_product(x[one.rows], change.dense.to(x.dtype))
    if change.kron_left is not None and change.kron_right is not None:
        y[one.rows, start:end] += _kron(x[one.rows], change.kron_left.to(x.dtype), change.kron_right.to(x.dtype))


def _kron(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """kron(left, right) @ x for each row, as left @ X @ right.T. x: [rows, i1 * i2], left [o1, i1], right [o2, i2]."""
    rows = padded_rows(x).view(-1, left.shape[1], right.shape[1])
    inner = (rows.reshape(-1, right.shape[1]) @ right.T).view(len(rows), left.shape[1], -1)
    outer = linear(inner.transpose(1, 2).reshape(-1, left.shape[1]), left).view(len(rows), right.shape[0], -1)
    return outer.transpose(1, 2).reshape(len(rows), -1)[: len(x)]


def _turned(z: torch.Tensor, group: int) -> torch.Tensor:
    first, second = z.unflatten(-1, (-1, group)).chunk(2, dim=-1)
    return torch.cat([-second, first], -1).flatten(-2)


def _replaced_rows(rows: Rows, head: HeadRows, device: torch.device) -> _ReplacedRows:
    return _ReplacedRows(rows, torch.tensor(head.token_ids, device=device), head.rows)


def _replace_rows(y: torch.Tensor, x: torch.Tensor, base: BaseProduct, head: _ReplacedRows) -> None:
    logits = invariant_product(x[head.rows], head.weights.to(x.dtype))
    bias = base.bias(0)
    if bias is not None:
        logits = logits + pad(bias, (0, y.shape[1] - len(bias)))[head.token_ids]
    own = y[head.rows]
    own[:, head.token_ids] = logits.to(y.dtype)
    y[head.rows] = own
