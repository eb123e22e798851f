"""From a step's plan to the arrays that the model, the attention and the adapters read.

Entries are ordered so that those of one adapter are neighbours: first the entries of few tokens
(base, then adapter by adapter), then the long chunks. All of it is array arithmetic over the
sequence table; nothing here is per layer, and the only loop is over prefill chunks.

An entry whose adapter begins to act within it (an invocation) has base rows before that: these are in no triple.

Running example: plan entries a: decode on slot 1, b: decode on the base, c: 64 tokens on slot 0
    order  b a c      row of b = 0, of a = 1, of c = 2..65, last rows 0, 1, 65
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from peft_core.batch import WIDE_ROWS, AdapterBatch, RowAdapters, Segment
from peft_core.forms import KVPrefix
from peft_core.kernels.staging import Staging, aligned_bytes
from peft_core.traits import VIRTUAL_TOKEN_BASE
from server.engine.kv_cache import KVCache
from server.engine.paged_attention import Chunk, DecodeBucket, PagedStep, PrefixRows
from server.engine.sequence import BASE_SLOT, SequenceTable
from server.engine.step import StepPlan

IntArray = npt.NDArray[np.int64]
PrefixSource = Callable[[int], KVPrefix | None]  # by slot


class JudgedRows(NamedTuple):
    """Prompt tokens of one plan entry whose log probabilities are wanted."""

    entry: int  # index in the plan
    first: int  # index of the first judging token in the sequence; it judges the token after it
    num_rows: int


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of the step that reach the LM head: those to sample from, then those whose prompt tokens are judged."""

    rows: IntArray  # [m] rows of the step
    num_samples: int
    sample_entries: IntArray  # [num_samples] plan index of each of the first rows
    prompt: list[JudgedRows]  # in row order after the samples


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
    """Writes a step's arrays; a batch is valid until the next one is built.

    Args:
        max_rows: of one step.
        prefix_of: tells the K/V prefixes of resident adapters.
    """

    def __init__(self, cache: KVCache, staging: Staging, max_rows: int, prefix_of: PrefixSource | None = None) -> None:
        self.cache, self.staging, self.prefix_of = cache, staging, prefix_of
        self.device = staging.device
        self._tokens, self._positions, self._write_rows = (staging.reserve((max_rows,), np.int64) for _ in range(3))

    @staticmethod
    def num_bytes(max_rows: int) -> int:
        """What it reserves of the staging."""
        return 3 * aligned_bytes((max_rows,), np.int64)

    def build(self, plan: StepPlan, table: SequenceTable) -> StepBatch:
        active_from = table.active_from[plan.rows]
        idle = np.minimum(np.maximum(active_from - plan.starts, 0), plan.counts)  # leading rows that are the base's
        slots = np.where(idle == plan.counts, BASE_SLOT, table.slot[plan.rows]).astype(np.int64)
        is_wide = plan.counts >= WIDE_ROWS
        order = np.lexsort((slots, plan.counts * is_wide))  # narrow first, then chunks by length, each by slot
        counts = plan.counts[order].astype(np.int64)
        starts = plan.starts[order].astype(np.int64)
        rows = plan.rows[order].astype(np.int64)
        ends = np.cumsum(counts)
        firsts = ends - counts
        offsets = np.arange(ends[-1]) - np.repeat(firsts, counts)
        positions = np.repeat(starts, counts) + offsets
        token_rows = np.repeat(rows, counts)
        units = table.blocks[token_rows, positions // table.block_size].astype(np.int64)
        in_block = positions % table.block_size
        tokens = table.tokens[token_rows, positions]
        head = _head_rows(plan, table, order, firsts, ends)
        num_rows = len(tokens)
        for array in (self._tokens, self._positions, self._write_rows):
            array.use(num_rows)
        self._tokens.host[:num_rows] = tokens
        self._positions.host[:num_rows] = np.maximum(positions - table.position_offset[token_rows], 0)
        self._write_rows.host[:num_rows] = units * self.cache.shape.rows_per_unit + in_block
        self.staging.flush()
        return StepBatch(
            input_ids=self._tokens.device[None, :num_rows],
            position_ids=self._positions.device[None, :num_rows],
            paged=PagedStep(
                cache=self.cache,
                write_rows=self._write_rows.device[:num_rows],
                decode=tuple(self._decode(table, rows, starts, counts, firsts)),
                chunks=tuple(self._chunks(table, rows, starts, counts, firsts)),
                layer_calls=[0] * self.cache.shape.num_layers,
                prefixes=self._prefixes(table, rows, starts, counts, firsts),
            ),
            adapters=AdapterBatch(
                tokens=_row_adapters(int(ends[-1]), slots[order], counts - idle[order], firsts + idle[order]),
                last=_head_adapters(head, slots, plan.starts + idle),
                has_virtual=bool((tokens >= VIRTUAL_TOKEN_BASE).any()),
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
            pinned = table.position_offset[rows[entries]]
            units = table.blocks[rows[entries, None], own].astype(np.int64)
            buckets.append(
                DecodeBucket(
                    rows=self._tensor(firsts[entries]),
                    blocks=self._tensor(units.reshape(-1) * (2 * self.cache.shape.num_layers)),
                    lengths=self._tensor(lengths[members]),
                    padded_length=num_blocks * table.block_size,
                    pinned=self._tensor(pinned) if pinned.any() else None,
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
            chunks.append(Chunk(int(firsts[entry]), count, start, blocks, int(table.position_offset[rows[entry]])))
        return chunks

    def _prefixes(
        self, table: SequenceTable, rows: IntArray, starts: IntArray, counts: IntArray, firsts: IntArray
    ) -> tuple[PrefixRows, ...]:
        """Rows of this step whose K/V come from an adapter."""
        ends = np.minimum(starts + counts, table.prefix_length[rows])
        prefixes = []
        for entry in np.flatnonzero(ends > starts).tolist():
            slot = int(table.slot[rows[entry]])
            prefix = self.prefix_of(slot) if self.prefix_of is not None else None
            if prefix is None or prefix.num_tokens != table.prefix_length[rows[entry]]:
                raise RuntimeError(f"the image in slot {slot} does not hold the prefix that its ticket promises")
            prefixes.append(PrefixRows(int(firsts[entry]), int(starts[entry]), int(ends[entry]), prefix))
        return tuple(prefixes)

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)


def _row_adapters(num_rows: int, slots: IntArray, counts: IntArray, firsts: IntArray) -> RowAdapters:
    """Entry by entry: the adapter in `slots` acts on `counts` rows from row `firsts` on."""
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
        row, start = plan.rows[entry], int(plan.starts[entry])
        first = max(start, plan.sequences[entry].layout.num_virtual)
        judged = min(start + int(plan.counts[entry]), int(table.prompt_length[row]) - 1) - first
        if judged > 0:
            prompt.append(JudgedRows(entry, first, judged))
            rows.append(firsts[position] + first - start + np.arange(judged))
    return HeadRows(np.concatenate(rows), len(sampling), order[sampling], prompt)


def _head_adapters(head: HeadRows, slots: IntArray, active_from: IntArray) -> RowAdapters:
    """`slots`, and from which token on they act: of each plan entry.

    Sampled rows are narrow; judged prompt rows of one sequence are one segment.
    """
    sampled = slots[head.sample_entries]
    used = np.flatnonzero(sampled != BASE_SLOT)
    segments, first = [], head.num_samples
    for entry, first_token, count in head.prompt:
        idle = max(0, int(active_from[entry]) - first_token)
        if slots[entry] != BASE_SLOT and idle < count:
            segments.append(Segment(first + idle, first + count, int(slots[entry])))
        first += count
    judged = RowAdapters.from_segments(first, segments)
    return RowAdapters(
        first,
        np.concatenate([used, judged.narrow_rows]),
        np.concatenate([sampled[used], judged.narrow_slots]),
        np.concatenate([np.ones(len(used), np.float32), judged.narrow_scales]),
        judged.wide,
    )
