"""Row numbers: where in the pool's tables the matrices of a batch's adapters lie.

Two kinds of numbers, kept apart because they change at different times:

    layout   what the lookups of a batch look like up to where images lie: depends on ranks only, so batches
             of one rank share it whoever is in them
    gathers  layout plus the descriptors of the slots, for all layers of one shape at once

Running example: two entries of rank 16 on q, k, v of 512 -> (512, 128, 128), tile 64
    down  3 bags an entry, 512 lookups each            hidden [6, 16]
    up    8 + 2 + 2 bags an entry, 16 lookups each     delta  [24, 64] = [2, 768]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from peft_core.batch import RowAdapters
from peft_core.residency import Residency
from peft_core.sites import DOWN_TILE, SiteGroup

INT32_ROWS = 2**31
KEPT_LAYOUTS = 64  # of 256 rows of mixed ranks on a base of 69 M parameters: about 0.5 MB each

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GroupGather:
    """The gathers of all narrow rows at one site group, entries ordered by rank signature."""

    rows: torch.Tensor  # [entries] int64, rows of y
    first_row: int  # rows are first_row, first_row + 1, ... ; -1: they are not
    tile_rows: torch.Tensor | None  # [down bags] int64, row of x of each bag; None: one bag a row, in order
    down_rows: torch.Tensor  # [down bags * in_features] int32 or int64
    down_bags: torch.Tensor  # [down bags], where each bag's lookups begin
    hidden: torch.Tensor  # [lookups], which hidden value weighs each up row
    scales: torch.Tensor | None  # [lookups] float, None: all one
    up_rows: torch.Tensor  # [lookups]
    up_bags: torch.Tensor  # [up bags]


@dataclass(frozen=True, slots=True)
class Shape:
    """What groups must have in common to be built at once."""

    in_features: int
    out_tiles: tuple[int, ...]  # one a member


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The lookups of one entry."""

    num_tiles: int  # down bags
    down_offset: torch.Tensor  # [num_tiles * in_features]
    up_part: torch.Tensor  # [lookups] int64, member of the group
    up_offset: torch.Tensor  # [lookups] row within the member's up block


@dataclass(frozen=True, slots=True)
class _Layout:
    """The lookups of a whole batch at groups of one shape."""

    order: IntArray  # [entries] index into the narrow rows: those that have any rank here, by signature
    pieces: tuple[tuple[int, int, _Pattern], ...]  # (first, end, pattern) of entries of one signature
    tile_entries: IntArray  # [down bags] index into the narrow rows
    down_bags: torch.Tensor
    hidden: torch.Tensor
    up_bags: torch.Tensor
    num_members: int
    num_inputs: IntArray  # [entries] lookups of the down product
    num_lookups: IntArray  # [entries] lookups of the up product


def group_shape(group: SiteGroup, tile: int) -> Shape:
    return Shape(group.in_features, tuple(-(-out // tile) for out in group.out_features))


class GatherBuilder:
    """Builds the gathers of a batch for the token groups or the head groups of a residency.

    The numbers are written into buffers that are kept: what `build` returned is valid until it is called again.
    """

    def __init__(self, residency: Residency, *, is_head: bool) -> None:
        self.residency = residency
        num_rows = max(len(residency.down_table), len(residency.up_table))
        self.dtype = torch.int32 if num_rows < INT32_ROWS else torch.int64
        self._groups = [
            (index, group_shape(group, residency.tile), int(first))
            for index, (group, first) in enumerate(zip(residency.groups, residency.first_part, strict=True))
            if group.is_head == is_head
        ]
        self._layout = lru_cache(maxsize=KEPT_LAYOUTS)(self._make_layout)
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def build(self, rows: RowAdapters) -> dict[int, GroupGather]:
        """By group; none where no row of the batch has an adapter."""
        ranks = self.residency.rank[rows.narrow_slots]  # [n, all parts]
        classes: dict[tuple[Shape, bytes], list[int]] = {}
        for index, shape, first in self._groups:
            signature = ranks[:, first : first + len(shape.out_tiles)].tobytes()
            classes.setdefault((shape, signature), []).append(index)
        gathers: dict[int, GroupGather] = {}
        for (shape, signature), members in classes.items():
            layout = self._layout(shape, signature)
            if layout is not None:
                gathers.update(zip(members, self._fill(layout, members, rows), strict=True))
        return gathers

    def _make_layout(self, shape: Shape, ranks_bytes: bytes) -> _Layout | None:
        ranks = np.frombuffer(ranks_bytes, np.int64).reshape(-1, len(shape.out_tiles))
        active = np.flatnonzero(ranks.any(1))
        if not len(active):
            return None
        signatures, which = np.unique(ranks[active], axis=0, return_inverse=True)
        which = which.reshape(-1)
        order = active[np.argsort(which, kind="stable")]
        counts = np.bincount(which)
        ends = np.cumsum(counts)
        pieces, hidden, lengths, tile_entries, inputs, lookups, num_bags = [], [], [], [], [], [], 0
        for signature, first, end in zip(signatures, ends - counts, ends, strict=True):
            own = tuple(signature.tolist())
            pattern = self._pattern(own, shape)
            bags = num_bags + np.arange(end - first)[:, None] * pattern.num_tiles
            hidden.append((bags * DOWN_TILE + _hidden_offsets(own, shape.out_tiles)).reshape(-1))
            lengths.append(np.tile(np.repeat(own, shape.out_tiles), end - first))
            tile_entries.append(np.repeat(order[first:end], pattern.num_tiles))
            inputs.append(np.full(end - first, len(pattern.down_offset)))
            lookups.append(np.full(end - first, len(pattern.up_offset)))
            pieces.append((int(first), int(end), pattern))
            num_bags += (end - first) * pattern.num_tiles
        up_bags = np.cumsum([0, *np.concatenate(lengths)])[:-1]
        return _Layout(
            order,
            tuple(pieces),
            np.concatenate(tile_entries),
            self._numbers(np.arange(num_bags) * shape.in_features),
            self._numbers(np.concatenate(hidden)),
            self._numbers(up_bags),
            len(shape.out_tiles),
            np.concatenate(inputs),
            np.concatenate(lookups),
        )

    def _pattern(self, ranks: tuple[int, ...], shape: Shape) -> _Pattern:
        num_tiles = -(-sum(ranks) // DOWN_TILE)
        lookups = [rank * tiles for rank, tiles in zip(ranks, shape.out_tiles, strict=True)]
        return _Pattern(
            num_tiles,
            self._numbers(np.arange(num_tiles * shape.in_features)),
            torch.from_numpy(np.repeat(np.arange(len(ranks)), lookups)),
            self._numbers(np.concatenate([np.arange(number) for number in lookups])),
        )

    def _fill(self, layout: _Layout, groups: list[int], rows: RowAdapters) -> list[GroupGather]:
        residency, slots = self.residency, rows.narrow_slots[layout.order]
        down = self._numbers(residency.down_row[slots][:, groups].T)  # [groups, entries]
        firsts = residency.first_part[groups]
        parts = firsts[:, None] + np.arange(layout.num_members)
        up = self._numbers(residency.up_row[slots][:, parts].transpose(1, 0, 2))  # [groups, entries, members]
        down_rows = self._buffer("down", groups, int(layout.num_inputs.sum()))
        up_rows = self._buffer("up", groups, int(layout.num_lookups.sum()))
        down_at = up_at = 0
        for first, end, pattern in layout.pieces:
            size = (len(groups), end - first, len(pattern.down_offset))
            torch.add(down[:, first:end, None], pattern.down_offset, out=_part(down_rows, down_at, size))
            down_at += size[1] * size[2]
            size = (len(groups), end - first, len(pattern.up_offset))
            own = up[:, first:end].index_select(2, pattern.up_part)
            torch.add(own, pattern.up_offset, out=_part(up_rows, up_at, size))
            up_at += size[1] * size[2]
        own_rows = rows.narrow_rows[layout.order]
        contiguous = bool((np.diff(own_rows) == 1).all())
        one_bag_each = contiguous and len(layout.tile_entries) == len(own_rows)
        own_rows_tensor = torch.from_numpy(own_rows)
        tile_rows = None if one_bag_each else torch.from_numpy(rows.narrow_rows[layout.tile_entries])
        scales = self._scales(layout, rows)
        return [
            GroupGather(
                rows=own_rows_tensor,
                first_row=int(own_rows[0]) if contiguous else -1,
                tile_rows=tile_rows,
                down_rows=down_rows[index],
                down_bags=layout.down_bags,
                hidden=layout.hidden,
                scales=scales,
                up_rows=up_rows[index],
                up_bags=layout.up_bags,
            )
            for index in range(len(groups))
        ]

    def _buffer(self, side: str, groups: list[int], width: int) -> torch.Tensor:
        """[groups, width], in memory that belongs to these groups."""
        key, size = (side, groups[0]), len(groups) * width
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[key] = torch.empty(size + size // 2, dtype=self.dtype)
        return buffer[:size].view(len(groups), width)

    def _scales(self, layout: _Layout, rows: RowAdapters) -> torch.Tensor | None:
        if (rows.narrow_scales == 1).all():
            return None
        scales = np.repeat(rows.narrow_scales[layout.order], layout.num_lookups)
        return torch.from_numpy(scales).to(self.residency.dtype)

    def _numbers(self, numbers: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.dtype)


def _part(table: torch.Tensor, first: int, size: tuple[int, int, int]) -> torch.Tensor:
    """Columns [first, first + size[1] * size[2]) of a table [groups, width], as [groups, entries, offsets]."""
    return table[:, first : first + size[1] * size[2]].view(size)


def _hidden_offsets(ranks: tuple[int, ...], out_tiles: tuple[int, ...]) -> IntArray:
    firsts = np.cumsum((0, *ranks))[:-1]
    return np.concatenate([first + np.tile(np.arange(rank), tiles)
                           for first, rank, tiles in zip(firsts, ranks, out_tiles, strict=True)])  # fmt: skip
