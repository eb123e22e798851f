"""How far an adapter moves the base: one short prompt through the engine on both, once, before anybody relies on it.

The forms of an adapter say what it multiplies and adds; only the model says whether that reaches an answer. Both rows
run as any request does, so a broken image shows here too.

Running example: 12 tokens, the likeliest 20 next ones
    {"tokens": 12, "largest_change": 1.83, "mean_change": 0.41}        in log probabilities (nats)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from server.engine.client import EngineClient
from server.engine.errors import EngineError
from server.engine.request import AdapterTicket, EngineRequest, FinishReason, SamplingParams

NUM_TOKENS = 12
NUM_LIKELIEST = 20
TIMEOUT_S = 20.0  # an upload does not wait for a crowd; the report says so then
NO_CHANGE = "the probe: on a short prompt this adapter does not move the base's log probabilities at all."
_SALT = "probe"  # a tenant of its own: nobody finds these blocks


class Reading(NamedTuple):
    """Log probabilities of one row: of its prompt's tokens, and of the likeliest next ones."""

    prompt: tuple[float, ...]
    likeliest: Mapping[int, float]


class ProbeFailed(Exception):
    """The row did not come to its end; the engine's own words."""


class Probe:
    """Belongs to one engine. The base's own row is computed once for each prompt."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._of_base: dict[tuple[int, ...], Reading] = {}

    async def add_to(self, report: Mapping[str, Any], ticket: AdapterTicket) -> dict[str, Any]:
        """A load report with what the probe found, and a warning where that is nothing.

        The image is loaded under a name of its own and leaves the device again, so nobody finds it there.
        """
        own = replace(ticket, key=f"{_SALT}:{ticket.key}")
        found = await self.measure(own)
        with contextlib.suppress(EngineError):
            await self._engine.evict(own.key)
        warnings = [*report["warnings"]]
        if found.get("largest_change") == 0:
            warnings.append(NO_CHANGE)
        if "failed" in found:
            warnings.append(f"the probe could not be made: {found['failed']}")
        return {**report, "probe": found, "warnings": warnings}

    async def measure(self, ticket: AdapterTicket) -> dict[str, Any]:
        """What the adapter changes, or why that is not known; never raises on account of the adapter or the engine."""
        prompt = self._prompt(ticket)
        try:
            if prompt not in self._of_base:
                self._of_base[prompt] = await self._read(prompt, None)
            base = self._of_base[prompt]
            adapted = await self._read(prompt, ticket)
        except (ProbeFailed, EngineError) as error:
            return {"failed": str(error)}
        changes = [abs(ours - theirs) for ours, theirs in zip(adapted.prompt, base.prompt, strict=True)]
        shared = adapted.likeliest.keys() & base.likeliest.keys()
        changes += [abs(adapted.likeliest[token] - base.likeliest[token]) for token in shared]
        if adapted.likeliest.keys() != base.likeliest.keys() and not any(changes):
            changes.append(abs(max(adapted.likeliest.values()) - max(base.likeliest.values())))
        return {
            "tokens": len(prompt),
            "largest_change": max(changes, default=0.0),
            "mean_change": sum(changes) / max(1, len(changes)),
        }

    def _prompt(self, ticket: AdapterTicket) -> tuple[int, ...]:
        """Token ids spread over the vocabulary; an adapter that waits for its invocation gets it."""
        vocab_size = self._engine.description.vocab_size
        spread = tuple((7919 * place + 11) % vocab_size for place in range(NUM_TOKENS))
        called = ticket.traits.invocation_tokens
        return (*spread[:4], *called, *spread[4:]) if called else spread

    async def _read(self, prompt: tuple[int, ...], ticket: AdapterTicket | None) -> Reading:
        likeliest = min(NUM_LIKELIEST, self._engine.description.vocab_size)
        request = EngineRequest(
            request_id=f"probe#{next(self._numbers)}",
            token_ids=prompt,
            params=SamplingParams(1, ignore_eos=True, num_logprobs=likeliest, num_prompt_logprobs=0),
            adapter=ticket,
            cache_salt=_SALT,
            deadline_s=TIMEOUT_S,
            task_id=0 if ticket is not None and ticket.traits.num_tasks else None,
        )
        of_prompt: tuple[float, ...] = ()
        async with self._engine.submit(request) as deltas:
            async for delta in deltas:
                if delta.finish is FinishReason.FAILED:
                    raise ProbeFailed("no reason was given" if delta.error is None else delta.error.message)
                told = delta.prompt_logprobs or ()
                of_prompt += tuple(record.logprob for record in told[1:] if record is not None)
                if delta.logprobs:
                    return Reading(of_prompt, dict(delta.logprobs[0].top))
        raise ProbeFailed("the engine gave no answer")
