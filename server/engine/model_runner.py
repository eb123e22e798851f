"""Runs one planned step on the device: build, forward, sample. Knows tensors; decides nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peft_core.kernels.staging import Staging
from peft_core.layers import ActiveBatch
from server.engine.batch_builder import BatchBuilder, PrefixSource, StepBatch
from server.engine.errors import StepOutOfMemory
from server.engine.kv_cache import KVCache
from server.engine.logprobs import prompt_logprobs
from server.engine.request import TokenLogprobs
from server.engine.sampler import Sampler
from server.engine.sequence import Sequence, SequenceTable
from server.engine.step import StepPlan, StepResult


class ModelRunner:
    """One base model with everything attached. Changes the cache and the sampler's state, no column of the table."""

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        active: ActiveBatch,
        sampler: Sampler,
        staging: Staging,
        max_rows: int,
        prefix_of: PrefixSource | None = None,
    ) -> None:
        self.model, self.cache, self.active, self.sampler = model, cache, active, sampler
        self.device = cache.pool.device
        self.builder = BatchBuilder(cache, staging, max_rows, prefix_of)

    def join(self, sequence: Sequence) -> None:
        """Register the sampling parameters of a sequence that just got its row.

        The prompt goes with its virtual tokens, whose ids are in no vocabulary: no penalty counts them.
        """
        prompt, generated = np.split(sequence.tokens, [sequence.prompt_length])
        self.sampler.join(sequence.row, sequence.params, prompt, generated, vocab_size=sequence.vocab_size)

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
        """Logits of the head rows: [m, vocab], wider than the base's where an adapter of the step is."""
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
            prompt_logprobs=self._judge(plan, table, batch, logits[head.num_samples :]),
            failed={int(entries[index]): reason for index, reason in sampled.failed.items()},
        )

    def _judge(
        self, plan: StepPlan, table: SequenceTable, batch: StepBatch, logits: torch.Tensor
    ) -> dict[int, list[TokenLogprobs]]:
        """Records of the prompt tokens that the step's rows predict."""
        records, done = {}, 0
        for entry, first, count in batch.head.prompt:
            row = int(plan.rows[entry])
            targets = table.tokens[row, first + 1 : first + 1 + count]
            top = plan.sequences[entry].params.num_prompt_logprobs
            own = logits[done : done + count, : self.sampler.vocab_size_of(row)]
            records[entry] = prompt_logprobs(own, targets, top or 0)
            done += count
        return records
