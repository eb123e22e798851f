"""From a step's plan to the arrays that the model, the attention and the adapters read.

Entries are ordered so that those of one adapter are neighbours: first the entries of few tokens
(base, then adapter by adapter), then the long chunks. All of it is array arithmetic over the
sequence table; nothing here is per layer, and the only loop is over prefill chunks.

Running example: plan entries a: decode on slot 1, b: decode on the base, c: 64 tokens on slot 0
    order  b a c      row of b = 0, of a = 1, of c = 2..65, last rows 0, 1, 65
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from peft_core.batch import WIDE_ROWS, AdapterBatch, RowAdapters, Segment
from server.engine.kv_cache import KVCache
from server.engine.paged_attention import Chunk, DecodeBucket, PagedStep
from server.engine.sequence import BASE_SLOT, SequenceTable
from server.engine.step import StepPlan

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of the step that reach the LM head: those to sample from, then those whose prompt tokens are judged."""

    rows: IntArray  # [m] rows of the step
    num_samples: int
    sample_entries: IntArray  # [num_samples] plan index of each of the first rows
    prompt: list[tuple[int, int]]  # (plan index, number of rows), in row order after the samples


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Everything of one step, on the device where it is read there."""

    input_ids: torch.Tensor  # [1, rows] int64
    position_ids: torch.Tensor  # [1, rows] int64
    paged: PagedStep
    adapters: AdapterBatch
    head: HeadRows
    fresh_units: torch.Tensor  # [k] int64, blocks that get their first token in this step


def bucket_blocks(num_blocks: IntArray) -> IntArray:
    """Blocks that a decoding sequence is padded to: the next of 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 2 ** np.ceil(np.log2(np.maximum(num_blocks, 1))).astype(np.int64)
    middle = power * 3 // 4
    return np.where((num_blocks <= middle) & (power >= 4), middle, power)


class BatchBuilder:
    """Holds no state but the sizes of the cache."""

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        self.cache, self.device = cache, device

    def build(self, plan: StepPlan, table: SequenceTable) -> StepBatch:
        slots = table.slot[plan.rows].astype(np.int64)
        is_wide = plan.counts >= WIDE_ROWS
        order = np.lexsort((slots, plan.counts * is_wide))  # narrow first, then chunks by length, each by slot
        counts = plan.counts[order].astype(np.int64)
        starts = plan.starts[order].astype(np.int64)
        rows, slots = plan.rows[order].astype(np.int64), slots[order]
        ends = np.cumsum(counts)
        firsts = ends - counts
        offsets = np.arange(ends[-1]) - np.repeat(firsts, counts)
        positions = np.repeat(starts, counts) + offsets
        token_rows = np.repeat(rows, counts)
        units = table.blocks[token_rows, positions // table.block_size].astype(np.int64)
        in_block = positions % table.block_size
        head = _head_rows(plan, table, order, firsts, ends)
        return StepBatch(
            input_ids=self._tensor(table.tokens[token_rows, positions])[None],
            position_ids=self._tensor(positions)[None],
            paged=PagedStep(
                cache=self.cache,
                write_rows=self._tensor(units * self.cache.shape.rows_per_unit + in_block),
                decode=tuple(self._decode(table, rows, starts, counts, firsts)),
                chunks=tuple(self._chunks(table, rows, starts, counts, firsts)),
                layer_calls=[0] * self.cache.shape.num_layers,
            ),
            adapters=AdapterBatch(
                tokens=_row_adapters(int(ends[-1]), slots, counts, firsts),
                last=_head_adapters(head, slots[np.argsort(order)], plan),
            ),
            head=head,
            fresh_units=self._tensor(units[in_block == 0]),
        )

    def _decode(
        self, table: SequenceTable, rows: IntArray, starts: IntArray, counts: IntArray, firsts: IntArray
    ) -> list[DecodeBucket]:
        decoding = np.flatnonzero(counts == 1)
        lengths = starts[decoding] + 1
        used = -(-lengths // table.block_size)
        padded = bucket_blocks(used)
        buckets = []
        for num_blocks in np.unique(padded).tolist():
            members = np.flatnonzero(padded == num_blocks)
            entries = decoding[members]
            columns = np.arange(num_blocks)
            own = np.where(columns < used[members, None], columns, 0)
            units = table.blocks[rows[entries, None], own].astype(np.int64)
            buckets.append(
                DecodeBucket(
                    rows=self._tensor(firsts[entries]),
                    blocks=self._tensor(units.reshape(-1) * (2 * self.cache.shape.num_layers)),
                    lengths=self._tensor(lengths[members]),
                    padded_length=num_blocks * table.block_size,
                )
            )
        return buckets

    def _chunks(
        self, table: SequenceTable, rows: IntArray, starts: IntArray, counts: IntArray, firsts: IntArray
    ) -> list[Chunk]:
        chunks = []
        for entry in np.flatnonzero(counts > 1).tolist():
            start, count = int(starts[entry]), int(counts[entry])
            used = -(-(start + count) // table.block_size) if start else 0
            units = table.blocks[rows[entry], :used].astype(np.int64)
            blocks = self._tensor(units * (2 * self.cache.shape.num_layers))
            chunks.append(Chunk(int(firsts[entry]), count, start, blocks))
        return chunks

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)


def _row_adapters(num_rows: int, slots: IntArray, counts: IntArray, firsts: IntArray) -> RowAdapters:
    narrow = np.flatnonzero((counts < WIDE_ROWS) & (slots != BASE_SLOT))
    wide = np.flatnonzero((counts >= WIDE_ROWS) & (slots != BASE_SLOT))
    lengths = counts[narrow]
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return RowAdapters(
        num_rows,
        np.repeat(firsts[narrow], lengths) + offsets,
        np.repeat(slots[narrow], lengths),
        np.ones(lengths.sum(), np.float32),
        tuple(
            Segment(first, first + count, slot)
            for first, count, slot in zip(
                firsts[wide].tolist(), counts[wide].tolist(), slots[wide].tolist(), strict=True
            )
        ),
    )


def _head_rows(plan: StepPlan, table: SequenceTable, order: IntArray, firsts: IntArray, ends: IntArray) -> HeadRows:
    sampling = np.flatnonzero(plan.samples[order])
    rows = [ends[sampling] - 1]
    prompt = []
    for position, entry in enumerate(order.tolist()):
        if not plan.sequences[entry].wants_prompt_logprobs:
            continue
        judged = min(int(plan.counts[entry]), int(table.prompt_length[plan.rows[entry]] - 1 - plan.starts[entry]))
        if judged > 0:
            prompt.append((entry, judged))
            rows.append(firsts[position] + np.arange(judged))
    return HeadRows(np.concatenate(rows), len(sampling), order[sampling], prompt)


def _head_adapters(head: HeadRows, slots: IntArray, plan: StepPlan) -> RowAdapters:
    """`slots`: of each plan entry. Sampled rows are narrow; judged prompt rows of one sequence are one segment."""
    sampled = slots[head.sample_entries]
    used = np.flatnonzero(sampled != BASE_SLOT)
    segments, first = [], head.num_samples
    for entry, count in head.prompt:
        if slots[entry] != BASE_SLOT:
            segments.append(Segment(first, first + count, int(slots[entry])))
        first += count
    judged = RowAdapters.from_segments(first, segments)
    return RowAdapters(
        first,
        np.concatenate([used, judged.narrow_rows]),
        np.concatenate([sampled[used], judged.narrow_slots]),
        np.concatenate([np.ones(len(used), np.float32), judged.narrow_scales]),
        judged.wide,
    )
