"""Prove that packed, paged and chunked execution computes what the model itself computes.

A model that accepts our attention and never calls it, or calls it with something else in mind,
answers wrongly without an error. So the plain model's logits are kept before anything is attached
and compared afterwards, on two sequences that share steps: a chunk, a finishing chunk beside a
decoding neighbour, and decoding of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from server.engine.errors import EngineStartError
from server.engine.model_runner import ModelRunner
from server.engine.request import EngineRequest, SamplingParams
from server.engine.sequence import BASE_SLOT, Sequence, SequenceTable
from server.engine.step import StepPlan

# Steps of (start, count) for the two sequences; None: not in this step.
STEPS: tuple[tuple[tuple[int, int] | None, ...], ...] = (
    ((0, 16), (0, 9)),
    ((16, 12), (9, 1)),
    ((28, 1), None),
    ((29, 1), (10, 1)),
)
LENGTHS = (30, 11)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}  # of the largest logit


@dataclass(frozen=True, slots=True)
class PlainLogits:
    """What the untouched model says: per sequence its tokens and logits [length, vocab]."""

    tokens: tuple[np.ndarray, ...]
    logits: tuple[torch.Tensor, ...]


def plain_logits(model: Any, vocab_size: int) -> PlainLogits:
    """Run the model's own forward, one sequence at a time."""
    random = np.random.default_rng(0)
    tokens = tuple(random.integers(0, vocab_size, length).astype(np.int32) for length in LENGTHS)
    logits = []
    for sequence in tokens:
        ids = torch.from_numpy(sequence.astype(np.int64))[None].to(model.device)
        with torch.inference_mode():
            logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return PlainLogits(tokens, tuple(logits))


def self_check(runner: ModelRunner, plain: PlainLogits, block_size: int) -> float:
    """Compare; returns the largest difference relative to the largest logit.

    Uses the first units of the cache, which must be nobody's.

    Raises:
        EngineStartError: a layer did not attend exactly once a step, or the logits differ.
    """
    differences = []
    table, sequences = _table(plain, block_size)
    for step in STEPS:
        plan = _plan(step, sequences)
        with torch.inference_mode():
            batch = runner.builder.build(plan, table)
            logits = runner.forward(batch).float().cpu()
        if set(batch.paged.layer_calls) != {1}:
            raise EngineStartError(
                "the model did not call paged attention exactly once in every layer "
                f"(calls per layer: {batch.paged.layer_calls}), so it would answer wrongly. It is not served."
            )
        for entry, row in zip(batch.head.sample_entries.tolist(), logits, strict=True):
            which = plan.sequences[entry].row
            position = int(plan.starts[entry] + plan.counts[entry] - 1)
            expected = plain.logits[which][position]
            differences.append((row - expected).abs().max() / expected.abs().max())
    tolerance = TOLERANCE[runner.cache.shape.dtype]
    worst = float(torch.stack(differences).max())  # NaN if any is
    if not worst <= tolerance:
        raise EngineStartError(
            f"packed and paged execution differs from the model's own by {worst:.1e} of the largest logit "
            f"(allowed: {tolerance:.0e}), so this model would be served wrongly. It is not served."
        )
    return worst


def _table(plain: PlainLogits, block_size: int) -> tuple[SequenceTable, list[Sequence]]:
    table = SequenceTable(len(LENGTHS), max(LENGTHS), block_size)
    sequences, unit = [], 0
    for index, tokens in enumerate(plain.tokens):
        request = EngineRequest(f"self-check-{index}", tuple(tokens.tolist()), SamplingParams(max_new_tokens=1))
        sequence = Sequence(request, arrival=index, max_length=len(tokens))
        row = table.join(sequence, BASE_SLOT)
        num_blocks = -(-len(tokens) // block_size)
        table.blocks[row, :num_blocks] = unit + np.arange(num_blocks)
        unit += num_blocks
        sequences.append(sequence)
    return table, sequences


def _plan(step: tuple[tuple[int, int] | None, ...], sequences: list[Sequence]) -> StepPlan:
    entries = [(sequence, *part) for sequence, part in zip(sequences, step, strict=True) if part is not None]
    own, starts, counts = zip(*entries, strict=True)
    return StepPlan(
        sequences=list(own),
        rows=np.array([sequence.row for sequence in own], np.int32),
        starts=np.array(starts, np.int32),
        counts=np.array(counts, np.int32),
        samples=np.ones(len(own), np.bool_),
    )
