"""The definition of a correct adapter product, in plain torch.

Semantics, for every triple (rows, slot, scale) and every member of the group:
    y[rows, columns] += scale * between(x[rows] @ down.T) @ up.T        between: a bottleneck's activation, or nothing
Accumulated in float32 or wider, added to y before rounding to y's dtype.
"""

from __future__ import annotations

import torch

from peft_core.batch import Between, RowAdapters, Segment
from peft_core.residency import Residency
from peft_core.sites import SiteGroup


class ReferenceKernels:
    """Works on any device and any mix; a Python loop over the triples, so not fast."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency

    def prepare(self, rows: RowAdapters, *, is_head: bool = False) -> tuple[Segment, ...]:
        narrow = zip(rows.narrow_rows.tolist(), rows.narrow_slots.tolist(), rows.narrow_scales.tolist(), strict=True)
        return (*(Segment(row, row + 1, slot, scale) for row, slot, scale in narrow), *rows.wide)

    def apply(
        self,
        group: SiteGroup,
        x: torch.Tensor,
        y: torch.Tensor,
        prepared: tuple[Segment, ...],
        between: Between | None = None,
    ) -> None:
        """x: [rows, in_features], y: [rows, sum(out_features)], changed in place."""
        for segment in prepared:
            rows = slice(segment.start, segment.end)
            deltas = self.residency.view(segment.slot, group)
            for path, (first, last) in zip(group.paths, group.columns, strict=True):
                delta = deltas.get(path)
                if delta is not None:
                    hidden = x[rows].float() @ delta.down.float().T
                    if between is not None:
                        hidden = between(hidden, torch.arange(segment.start, segment.end))
                    y[rows, first:last] += segment.scale * (hidden @ delta.up.float().T)
