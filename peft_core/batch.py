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

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

WIDE_ROWS = 8  # from this many rows on, one matrix product beats row-wise products


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


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """All triples of one step."""

    tokens: RowAdapters
    last: RowAdapters
