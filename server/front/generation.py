"""One accepted text request: its sequences in the engine, its adapter's lease, its place in the counts.

open -> deltas ... -> finished | aborted | failed, counted once; the lease is given back last
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from server.engine.metrics import RequestMetrics
from server.engine.request import AdapterTicket
from server.front.errors import FrontError
from server.front.sequence_text import SequenceText
from server.front.text import TextDelta, TextFinish, TextRequest


class AdapterLease(Protocol):
    """A hold on one adapter version from the moment its name was resolved."""

    @property
    def ticket(self) -> AdapterTicket: ...

    @property
    def version(self) -> Any: ...

    @property
    def report(self) -> Mapping[str, Any]: ...

    def release(self) -> None: ...


class ResolvedAdapter(NamedTuple):
    """Which version answers."""

    name: str
    version: int


class Generation:
    """Made by `Front.open`. `deltas` may be called once; `close` may be called at any time, also twice."""

    def __init__(
        self,
        request: TextRequest,
        sequences: Sequence[SequenceText],
        lease: AdapterLease | None,
        metrics: RequestMetrics,
        num_prompt_tokens: int,
    ) -> None:
        self.request = request
        self.adapter = None if lease is None else ResolvedAdapter(lease.version.name, lease.version.version)
        self.num_prompt_tokens = num_prompt_tokens
        self._sequences = sequences
        self._lease = lease
        self._metrics = metrics
        self._counts = metrics.of_adapter("" if self.adapter is None else self.adapter.name)
        self._counts.num_in_flight += 1
        self._finishes: list[TextFinish] = []
        self._failed = False
        self._closed = False

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Everything that is said, sequences interleaved; closing it early aborts what still runs.

        Raises:
            FrontError: the engine could not finish; everything else of this request is aborted.
        """
        source = self._one() if len(self._sequences) == 1 else self._several()
        try:
            async for delta in source:
                if delta.finish is not None:
                    self._finishes.append(delta.finish)
                yield delta
        except FrontError:
            self._failed = True
            raise
        finally:
            await source.aclose()
            self.close()

    def close(self) -> None:
        """Abort what still runs, give the lease back, count the request."""
        if self._closed:
            return
        self._closed = True
        for sequence in self._sequences:
            sequence.stream.leave()
        self._counts.num_in_flight -= 1
        self._count()
        if self._lease is not None:
            self._lease.release()

    def __del__(self) -> None:
        self.close()

    async def _one(self) -> AsyncGenerator[TextDelta, None]:
        async for delta in self._sequences[0]:
            yield delta

    async def _several(self) -> AsyncGenerator[TextDelta, None]:
        queue: asyncio.Queue[TextDelta | Exception] = asyncio.Queue(maxsize=len(self._sequences))
        tasks = [asyncio.create_task(_pump(sequence, queue)) for sequence in self._sequences]
        try:
            num_left = len(tasks)
            while num_left:
                told = await queue.get()
                if isinstance(told, Exception):
                    raise told
                num_left -= told.finish is not None
                yield told
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _count(self) -> None:
        metrics, finishes = self._metrics, self._finishes
        is_complete = len(finishes) == len(self._sequences)
        outcome = "failed" if self._failed else finishes[0].reason.value if is_complete else "aborted"
        metrics.outcomes[outcome] += 1
        self._counts.outcomes[outcome] += 1
        if not is_complete:
            return
        num_generated = sum(finish.num_generated for finish in finishes)
        self._counts.num_prompt_tokens += self.num_prompt_tokens
        self._counts.num_generated_tokens += num_generated
        first_token_s = min(finish.timing.first_token_s for finish in finishes)
        total_s = max(finish.timing.total_s for finish in finishes)
        queue_s = finishes[0].timing.queue_s
        metrics.total_s.observe(total_s)
        metrics.queue_s.observe(queue_s)
        metrics.inference_s.observe(total_s - queue_s)
        metrics.prefill_s.observe(max(0.0, first_token_s - queue_s))
        metrics.decode_s.observe(total_s - first_token_s)
        if num_generated > len(finishes):
            gaps = num_generated - len(finishes)
            metrics.per_token_s.observe((total_s - first_token_s) * len(finishes) / gaps)
        metrics.num_prompt_tokens.observe(self.num_prompt_tokens)
        metrics.num_generated_tokens.observe(num_generated)
        metrics.max_new_tokens.observe(self.request.params.max_new_tokens)
        metrics.num_sequences.observe(len(self._sequences))


async def _pump(sequence: SequenceText, queue: asyncio.Queue[TextDelta | Exception]) -> None:
    try:
        async for delta in sequence:
            await queue.put(delta)
    except Exception as error:  # whoever reads the queue raises it
        await queue.put(error)
