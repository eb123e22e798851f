"""Runs one planned step on the device: build, forward, sample. Knows tensors; decides nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peft_core.layers import ActiveBatch
from server.engine.batch_builder import BatchBuilder, StepBatch
from server.engine.errors import StepOutOfMemory
from server.engine.kv_cache import KVCache
from server.engine.logprobs import prompt_logprobs
from server.engine.request import TokenLogprobs
from server.engine.sampler import Sampler
from server.engine.sequence import Sequence, SequenceTable
from server.engine.step import StepPlan, StepResult


class ModelRunner:
    """One base model with everything attached. Changes the cache and the sampler's state, no column of the table."""

    def __init__(self, model: Any, cache: KVCache, active: ActiveBatch, sampler: Sampler) -> None:
        self.model, self.cache, self.active, self.sampler = model, cache, active, sampler
        self.device = cache.pool.device
        self.builder = BatchBuilder(cache, self.device)

    def join(self, sequence: Sequence) -> None:
        """Register the sampling parameters of a sequence that just got its row."""
        prompt, generated = np.split(sequence.tokens, [sequence.prompt_length])
        self.sampler.join(sequence.row, sequence.params, prompt, generated)

    def forget(self, row: int) -> None:
        self.sampler.forget(row)

    def execute(self, plan: StepPlan, table: SequenceTable) -> StepResult:
        """See `server.engine.step.Runner`.

        Raises:
            StepOutOfMemory: the device had no room for this step's activations.
        """
        try:
            with torch.inference_mode():
                batch = self.builder.build(plan, table)
                logits = self.forward(batch)
                return self._sample(plan, table, batch, logits)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise StepOutOfMemory(str(error)) from error
        except RuntimeError as error:
            if "allocate memory" in str(error):  # torch's CPU allocator has no error class of its own
                raise StepOutOfMemory(str(error)) from error
            raise

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Logits of the head rows: [m, vocab]."""
        if len(batch.fresh_units):
            self.cache.clear(batch.fresh_units)
        keep = torch.from_numpy(batch.head.rows).to(self.device)
        with self.active.use(batch.adapters):
            output = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=keep,
                paged=batch.paged,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _sample(self, plan: StepPlan, table: SequenceTable, batch: StepBatch, logits: torch.Tensor) -> StepResult:
        head = batch.head
        entries = head.sample_entries  # plan index of each sampled row, in step order
        sampled = self.sampler.sample(logits[: head.num_samples], plan.rows[entries], table)
        return StepResult(
            token_ids=sampled.token_ids[np.argsort(entries)],
            logprobs={int(entries[index]): record for index, record in sampled.logprobs.items()},
            prompt_logprobs=_judge(plan, table, batch, logits[head.num_samples :]),
            failed={int(entries[index]): reason for index, reason in sampled.failed.items()},
        )


def _judge(
    plan: StepPlan, table: SequenceTable, batch: StepBatch, logits: torch.Tensor
) -> dict[int, list[TokenLogprobs]]:
    """Records of the prompt tokens that the step's rows predict."""
    records, first = {}, 0
    for entry, count in batch.head.prompt:
        start, row = int(plan.starts[entry]), plan.rows[entry]
        targets = table.tokens[row, start + 1 : start + 1 + count]
        top = plan.sequences[entry].params.num_prompt_logprobs
        records[entry] = prompt_logprobs(logits[first : first + count], targets, top or 0)
        first += count
    return records
