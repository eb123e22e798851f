"""Adapter products on CPU: one weighted gather a row for decode, one matrix product a chunk for prefill.

A narrow row's product is a weighted sum of table rows, which is what `embedding_bag` computes,
vectorised, in parallel over rows, straight from the pool and at exact ranks:

    hidden[tile]  = sum_k  x[k]      * down_table[down_row + tile * in_features + k]     16 ranks a bag
    y[out_tile]  += sum_r  hidden[r] * up_table[up_row + out_tile * rank + r]            64 columns a bag

Sums are accumulated in float32. A row is summed alone and in a fixed order, so its bits do not
depend on which rows share the step. On two cores 16 distinct rank-16 adapters add about 2.1 times the
time that reading their bytes takes in float32 (`bench/results/versus_peft_float32.json`).

A chunk's rows are multiplied together and only with each other; in bfloat16, chunks of one length
share one batched product, in which each keeps the bits that it has alone.

The row numbers (`peft_core.kernels.gathers`) depend only on who is in the batch, so they are kept until
that changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from peft_core.batch import Between, RowAdapters, Segment
from peft_core.kernels.gathers import GatherBuilder, GroupGather, group_shape
from peft_core.residency import Residency
from peft_core.sites import DOWN_TILE, SiteGroup


@dataclass(frozen=True, slots=True)
class _Matrices:
    """One adapter at one group, as views of the pool."""

    down: torch.Tensor  # [tiles, in_features, DOWN_TILE]
    # (columns of y [start, end), first column of hidden, up [tiles, rank, tile]), one a member with a rank
    members: tuple[tuple[int, int, int, torch.Tensor], ...]


@dataclass(frozen=True, slots=True)
class RowwisePlan:
    gathers: Mapping[int, GroupGather]  # by group; none where no row of the batch has an adapter
    runs: tuple[tuple[Segment, ...], ...]  # wide segments, those of one length that follow one another together


class RowwiseKernels:
    """See the module docstring. `prepare` once a step and row set, `apply` once a group."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.out_tiles = [group_shape(group, residency.tile).out_tiles for group in residency.groups]
        self.is_padded = [any(out % residency.tile for out in group.out_features) for group in residency.groups]
        self.is_batched = residency.dtype == torch.bfloat16  # see `_runs`
        self.num_plans_built = 0
        self._builders = {is_head: GatherBuilder(residency, is_head=is_head) for is_head in (False, True)}
        self._kept: dict[bool, tuple[tuple[bytes, ...], Mapping[int, GroupGather]]] = {}
        self._views: dict[int, tuple[int, tuple[_Matrices | None, ...]]] = {}  # slot -> (epoch, one a group)

    def prepare(self, rows: RowAdapters, *, is_head: bool = False) -> RowwisePlan:
        """Row numbers for the groups of one kind; rebuilt only when the batch's members changed."""
        if not len(rows.narrow_rows):
            return RowwisePlan({}, self._runs(rows.wide))
        arrays = (rows.narrow_rows, rows.narrow_slots, rows.narrow_scales, self.residency.epochs[rows.narrow_slots])
        key = tuple(array.tobytes() for array in arrays)
        kept = self._kept.get(is_head)
        if kept is None or kept[0] != key:
            self.num_plans_built += 1
            self._kept.pop(is_head, None)  # the build overwrites its buffers, also if it fails half-way
            self._kept[is_head] = kept = (key, self._builders[is_head].build(rows))
        return RowwisePlan(kept[1], self._runs(rows.wide))

    def apply(
        self, group: SiteGroup, x: torch.Tensor, y: torch.Tensor, plan: RowwisePlan, between: Between | None = None
    ) -> None:
        """x: [rows, in_features], y: [rows, sum(out_features)], changed in place."""
        index = self.residency.group_index[group.leader]
        gather = plan.gathers.get(index)
        if gather is None and not plan.runs:
            return
        x = x.to(self.residency.dtype)
        if gather is not None:
            self._add_narrow(index, gather, x, y, between)
        for run in plan.runs:
            if self.is_batched and y.dtype == x.dtype:
                self._add_run(index, run, x, y, between)
            else:
                for segment in run:
                    self._add_wide(index, segment, x, y, between)

    def _add_narrow(
        self, index: int, gather: GroupGather, x: torch.Tensor, y: torch.Tensor, between: Between | None
    ) -> None:
        entries = len(gather.rows)
        if gather.tile_rows is None:
            inputs = x[gather.first_row : gather.first_row + entries]
        else:
            inputs = x.index_select(0, gather.tile_rows)
        hidden = _weighted_sums(self.residency.down_table, gather.down_rows, gather.down_bags, inputs.reshape(-1))
        if between is not None:
            hidden = between(hidden, gather.rows if gather.tile_rows is None else gather.tile_rows)
        weights = hidden.view(-1).index_select(0, gather.hidden)
        if gather.scales is not None:
            weights = weights * gather.scales
        delta = _weighted_sums(self.residency.up_table, gather.up_rows, gather.up_bags, weights).view(entries, -1)
        if self.is_padded[index]:
            delta = self._without_padding(index, delta)
        if gather.first_row >= 0:
            y[gather.first_row : gather.first_row + entries].add_(delta)
        elif delta.dtype == y.dtype:
            y.index_add_(0, gather.rows, delta)
        else:  # add before rounding to the base's dtype
            y.add_(torch.zeros(y.shape, dtype=delta.dtype).index_add_(0, gather.rows, delta))

    def _add_wide(
        self, index: int, segment: Segment, x: torch.Tensor, y: torch.Tensor, between: Between | None
    ) -> None:
        matrices = self._matrices(segment.slot)[index]
        if matrices is None:
            return
        rows = slice(segment.start, segment.end)
        in_features = self.residency.groups[index].in_features
        hidden = x[rows] @ matrices.down.permute(1, 0, 2).reshape(in_features, -1)
        if between is not None:
            hidden = between(hidden, torch.arange(segment.start, segment.end))
        for start, end, column, up in matrices.members:
            out_tiles, rank, tile = up.shape
            columns = up.permute(1, 0, 2).reshape(rank, out_tiles * tile)[:, : end - start]
            target, inputs = y[rows, start:end], hidden[:, column : column + rank]
            if y.dtype == hidden.dtype:
                target.addmm_(inputs, columns, alpha=segment.scale)
            else:
                target.add_(inputs @ columns, alpha=segment.scale)

    def _runs(self, wide: tuple[Segment, ...]) -> tuple[tuple[Segment, ...], ...]:
        """Segments that may be multiplied together.

        A batched product costs a third of as many single ones in bfloat16, and gives each segment the bits that it
        has as a batch of one; in float32 it gains little, and the bits of small products depend on the batch.
        """
        if not self.is_batched:
            return tuple((segment,) for segment in wide)
        runs: list[list[Segment]] = []
        for segment in wide:
            last = runs[-1][-1] if runs else None
            if last is not None and last.end == segment.start and _length(last) == _length(segment):
                runs[-1].append(segment)
            else:
                runs.append([segment])
        return tuple(tuple(run) for run in runs)

    def _add_run(
        self, index: int, run: tuple[Segment, ...], x: torch.Tensor, y: torch.Tensor, between: Between | None
    ) -> None:
        """All segments of a run at once: members on the diagonal of one up matrix, ranks padded to the widest."""
        matrices = [self._matrices(segment.slot)[index] for segment in run]
        num_tiles = max((len(one.down) for one in matrices if one is not None), default=0)
        if not num_tiles:
            return
        in_features, out_features = self.residency.groups[index].in_features, y.shape[1]
        down = x.new_zeros(len(run), in_features, num_tiles, DOWN_TILE)
        up = x.new_zeros(len(run), num_tiles * DOWN_TILE, out_features)
        for place, (one, segment) in enumerate(zip(matrices, run, strict=True)):
            if one is None:
                continue
            down[place, :, : len(one.down)] = one.down.permute(1, 0, 2)
            for start, end, column, part in one.members:
                out_tiles, rank, tile = part.shape
                columns = part.permute(1, 0, 2).reshape(rank, out_tiles * tile)[:, : end - start]
                up[place, column : column + rank, start:end] = (
                    columns if segment.scale == 1 else columns * segment.scale
                )
        rows = slice(run[0].start, run[-1].end)
        hidden = torch.bmm(x[rows].view(len(run), -1, in_features), down.flatten(2))
        if between is not None:
            hidden = between(hidden.flatten(0, 1), torch.arange(rows.start, rows.stop)).view_as(hidden)
        y[rows].view(len(run), -1, out_features).baddbmm_(hidden, up)

    def _matrices(self, slot: int) -> tuple[_Matrices | None, ...]:
        """Views of one adapter's tiles in the pool, a group at a time; kept until the slot changes."""
        epoch = int(self.residency.epochs[slot])
        kept = self._views.get(slot)
        if kept is None or kept[0] != epoch:
            views = tuple(self._group_views(slot, index) for index in range(len(self.residency.groups)))
            self._views[slot] = kept = (epoch, views)
        return kept[1]

    def _group_views(self, slot: int, index: int) -> _Matrices | None:
        residency, group = self.residency, self.residency.groups[index]
        tiles, down_row = int(residency.tiles[slot, index]), int(residency.down_row[slot, index])
        if not tiles:
            return None
        down = residency.down_table[down_row : down_row + tiles * group.in_features]
        members, column, first_part = [], 0, residency.first_part[index]
        for part, ((start, end), out_tiles) in enumerate(zip(group.columns, self.out_tiles[index], strict=True)):
            rank, up_row = int(residency.rank[slot, first_part + part]), int(residency.up_row[slot, first_part + part])
            if rank:
                up = residency.up_table[up_row : up_row + out_tiles * rank].view(out_tiles, rank, residency.tile)
                members.append((start, end, column, up))
            column += rank
        return _Matrices(down.view(tiles, group.in_features, DOWN_TILE), tuple(members))

    def _without_padding(self, index: int, delta: torch.Tensor) -> torch.Tensor:
        tile, pieces, first = self.residency.tile, [], 0
        for out, out_tiles in zip(self.residency.groups[index].out_features, self.out_tiles[index], strict=True):
            pieces.append(delta[:, first : first + out])
            first += out_tiles * tile
        return torch.cat(pieces, 1)


def _length(segment: Segment) -> int:
    return segment.end - segment.start


def _weighted_sums(table: torch.Tensor, rows: torch.Tensor, bags: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[bags, width]: the sum of weights[i] * table[rows[i]] over each bag; an empty bag is zero."""
    return torch.embedding_bag(table, rows, bags, False, 0, False, weights, False)[0]
