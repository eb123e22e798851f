"""Which adapters act on which rows of this step.

One step is one packed forward pass: the tokens of all scheduled sequences, one after
another. A step carries triples (row range, slot, scale), once for its token rows and once
for its last rows (the only ones that reach the LM head). A row may appear in several
triples; a row in none is the base's.

A sequence that computes few tokens (decode) is *narrow*: each of its rows is multiplied on
its own, so its arithmetic cannot depend on its neighbours. A sequence that computes many
(prefill) is *wide*: its rows are multiplied together, and only with each other.

Running example: sequences of 1, 1 and 64 tokens on (base, slot 2, slot 0)
    narrow  rows [1]  slots [2]  scales [1.0]
    wide    (Segment(start=2, end=66, slot=0, scale=1.0),)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from peft_core.errors import UnsupportedAdapter

WIDE_ROWS = 8  # from this many rows on, one matrix product beats row-wise products


# What happens between the two products of a bottleneck: hidden [n, ranks], row of the step of each of the n -> hidden
Between = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Segment(NamedTuple):
    """Rows [start, end) of the step use the adapter in `slot`, its output multiplied by `scale`."""

    start: int
    end: int
    slot: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RowAdapters:
    """The triples of one tensor [num_rows, features], split by how they are multiplied."""

    num_rows: int
    narrow_rows: np.ndarray  # [n] int64, ascending
    narrow_slots: np.ndarray  # [n] int64
    narrow_scales: np.ndarray  # [n] float32
    wide: tuple[Segment, ...] = ()

    @property
    def is_base_only(self) -> bool:
        return not len(self.narrow_rows) and not self.wide

    @classmethod
    def from_segments(cls, num_rows: int, segments: list[Segment]) -> RowAdapters:
        """Split triples, one a sequence, in row order; ranges may overlap (composition)."""
        narrow = [segment for segment in segments if segment.end - segment.start < WIDE_ROWS]
        lengths = [segment.end - segment.start for segment in narrow]
        rows = [np.arange(segment.start, segment.end) for segment in narrow]
        return cls(
            num_rows,
            np.concatenate(rows) if rows else np.zeros(0, np.int64),
            np.repeat(np.array([segment.slot for segment in narrow], np.int64), lengths),
            np.repeat(np.array([segment.scale for segment in narrow], np.float32), lengths),
            tuple(segment for segment in segments if segment.end - segment.start >= WIDE_ROWS),
        )


class SlotRows(NamedTuple):
    """Rows of one adapter that may be computed together: all its narrow rows, or one wide segment."""

    slot: int
    rows: npt.NDArray[np.int64]  # [n], ascending
    is_narrow: bool


def rows_by_slot(rows: RowAdapters, slots: Collection[int]) -> tuple[SlotRows, ...]:
    """The rows of those of `slots` that are in the batch.

    Raises:
        UnsupportedAdapter: a scale other than 1, which only the low-rank form has a meaning for.
    """
    chosen = np.isin(rows.narrow_slots, list(slots))
    wide = [segment for segment in rows.wide if segment.slot in slots]
    if (rows.narrow_scales[chosen] != 1).any() or any(segment.scale != 1 for segment in wide):
        raise UnsupportedAdapter("an adapter that is more than a low-rank addition cannot be scaled.")
    narrow = [
        SlotRows(slot, rows.narrow_rows[rows.narrow_slots == slot], is_narrow=True)
        for slot in np.unique(rows.narrow_slots[chosen]).tolist()
    ]
    whole = [SlotRows(part.slot, np.arange(part.start, part.end), is_narrow=False) for part in wide]
    return (*narrow, *whole)


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """All triples of one step."""

    tokens: RowAdapters
    last: RowAdapters
    has_virtual: bool = False  # some of its tokens are virtual, see `peft_core.traits`
