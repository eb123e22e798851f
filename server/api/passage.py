"""One request's way through the house: counted in, generated, counted out, whatever happens.

`deltas()` is the only door: closing it (or cancelling whoever awaits it) aborts the generation and gives the adapter's
lease back, then counts the request out. The caller decides which adapters exist, and with whom prompts are shared.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from adapters_store.errors import AdapterNotFound
from adapters_store.names import parse_reference
from server.api.caller import Caller, visible_page
from server.api.errors import Forbidden
from server.api.service import Service
from server.front.generation import Generation, ResolvedAdapter
from server.front.text import TextDelta, TextFinish, TextRequest
from server.library.library import Library
from server.usage import Account, Use

_MAX_CANDIDATES = 500  # compared with a mistyped name; more would hold up the event loop


class Passage:
    """Parameters: `arrived_s` is when the request's first byte was seen, by `time.perf_counter`."""

    def __init__(self, service: Service, asked: TextRequest, arrived_s: float, caller: Caller) -> None:
        self.service = service
        salt = "" if service.settings.share_prefix_cache else caller.tenant
        self.asked = replace(asked, cache_salt=salt)
        self._caller = caller
        self._front = service.front
        self._arrived_s = arrived_s
        self._submitted_s = time.perf_counter()
        self._adapter: ResolvedAdapter | None = None
        self._finishes: list[TextFinish] = []
        self._num_sent = 0  # tokens

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The front's deltas, in a house that knows how many guests it has."""
        with self.service.guest():
            generation = await self._open()
            self._adapter = generation.adapter
            async with aclosing(generation.deltas()) as deltas:
                try:
                    async for delta in deltas:
                        self._note(delta)
                        yield delta
                    self._note_outcome(failed=False)
                except Exception:
                    self._note_outcome(failed=True)
                    raise
                finally:
                    self._note_use(generation.num_prompt_tokens)

    async def _open(self) -> Generation:
        """Raises what the front raises, and Forbidden; an unknown name comes with those that are near it."""
        try:
            self._require_in_scope()
            return await self._front.open(self.asked)
        except AdapterNotFound as error:
            assert self.asked.adapter is not None
            near = near_names(self._front.library, self.asked.adapter, self._caller)
            if not near:
                raise
            raise AdapterNotFound(f"{error} Did you mean {' or '.join(map(repr, near))}?") from None

    def _note(self, delta: TextDelta) -> None:
        self._num_sent += len(delta.tokens)
        if delta.finish is not None:
            self._finishes.append(delta.finish)

    def _note_outcome(self, *, failed: bool) -> None:
        """For canaries. A caller who leaves is no outcome."""
        if self._adapter is not None:
            self._front.library.releases.observe(self._adapter.name, self._adapter.version, failed=failed)

    def _note_use(self, num_prompt_tokens: int) -> None:
        if self.service.ledger is None:
            return
        name, version = self._adapter or ("", 0)
        use = Use(
            requests=1,
            unfinished=int(len(self._finishes) < self.asked.num_sequences),
            prompt_tokens=num_prompt_tokens,
            cached_tokens=max((finish.num_cached for finish in self._finishes), default=0),
            generated_tokens=self._num_sent,
        )
        self.service.ledger.note(Account(self._caller.name, name, version), use)

    def _require_in_scope(self) -> None:
        """Raises AdapterNotFound, InvalidName or Forbidden."""
        if self.asked.adapter is not None:
            self._caller.require(parse_reference(self.asked.adapter).name)
        elif not self._caller.may_use_base:
            raise Forbidden("this key may not use the base alone; name an adapter")

    def headers(self) -> dict[str, str]:
        """Which weights answer; known before the first token."""
        device = self._front.engine.description.device
        headers = {"x-compute-type": f"{'gpu' if device == 'cuda' else device}+optimized"}
        headers["x-model-id"] = self.service.settings.base_name
        if self._adapter is not None:
            headers["x-adapter-id"] = self._adapter.name
            headers["x-adapter-version"] = str(self._adapter.version)
        return headers

    def timing_headers(self) -> dict[str, str]:
        """Milliseconds as integers, except x-compute-time in seconds; the whole answer is known."""
        assert self._finishes
        timings = [finish.timing for finish in self._finishes]
        num_generated = sum(finish.num_generated for finish in self._finishes)
        num_prompt = self._finishes[0].num_prompt_tokens
        total_s = time.perf_counter() - self._arrived_s
        queue_s = min(timing.queue_s for timing in timings)
        inference_s = max(timing.total_s for timing in timings) - queue_s
        return {
            "x-compute-time": f"{total_s:.6f}",
            "x-total-time": _ms(total_s),
            "x-validation-time": _ms(self._submitted_s - self._arrived_s),
            "x-queue-time": _ms(queue_s),
            "x-inference-time": _ms(inference_s),
            "x-time-per-token": _ms(inference_s / max(1, num_generated)),
            "x-time-to-first-token": _ms(min(timing.first_token_s for timing in timings)),
            "x-prompt-tokens": str(num_prompt),
            "x-generated-tokens": str(num_generated),
            "x-total-tokens": str(num_prompt + num_generated),
        }


def near_names(library: Library, reference: str, caller: Caller) -> list[str]:
    """Names of adapters that a mistyped reference may have meant, best first; only such as the caller sees."""
    name = reference.partition("@")[0]
    candidates = [record.name for record in visible_page(library, caller, name[:1], _MAX_CANDIDATES).records]
    return difflib.get_close_matches(name, candidates, n=3)


def _ms(seconds: float) -> str:
    return str(max(0, round(seconds * 1000)))
