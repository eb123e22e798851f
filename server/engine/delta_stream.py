"""One request's deltas on their way from the engine to a consumer that may be slow.

What arrives while the consumer is busy merges into one delta, so the memory held is the tokens
themselves, and a waiting consumer is woken once a step however much the step said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from server.engine.request import EngineErrorRecord, FinishReason, RequestDelta, TokenLogprobs


class DeltaStream:
    """Async iterator over one request's deltas; leaving it early (or cancelling a wait) aborts the request.

    Times are seconds of `time.monotonic`, as the engine's messages arrived.
    """

    def __init__(self, request_id: str, submitted_s: float, on_leave: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.submitted_s = submitted_s
        self.first_token_s: float | None = None
        self.last_token_s = submitted_s
        self.queue_s = 0.0  # accepted until first scheduled, by the engine's clock
        self.num_tokens = 0
        self._on_leave = on_leave
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False  # the finish has been handed out, or the consumer left
        # What has arrived and was not handed out:
        self._fresh = False
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._num_cached_tokens = 0
        self._finish: FinishReason | None = None
        self._error: EngineErrorRecord | None = None

    def push_token(self, token_id: int, record: TokenLogprobs | None = None) -> None:
        """The ordinary case of `push`: one token, and its log probability where that was asked for."""
        self._token_ids.append(token_id)
        if record is not None:
            self._logprobs.append(record)
        self._wake()

    def push(self, delta: RequestDelta) -> None:
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        self.queue_s = max(self.queue_s, delta.queue_s)
        self._finish = delta.finish
        self._error = delta.error
        self._wake()

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> RequestDelta:
        if self._ended:
            raise StopAsyncIteration
        if not self._fresh:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.leave()
                raise
            finally:
                self._waiter = None
        if self._ended:
            raise StopAsyncIteration
        return self._take()

    def leave(self) -> None:
        """The consumer wants no more; the request is aborted unless it has ended."""
        if not self._ended:
            self._ended = True
            self._wake()
            self._on_leave(self.request_id)

    async def aclose(self) -> None:
        self.leave()

    async def __aenter__(self) -> DeltaStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def __del__(self) -> None:
        if not self._ended and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_leave, self.request_id)

    def _wake(self) -> None:
        self._fresh = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> RequestDelta:
        delta = RequestDelta(
            self.request_id,
            tuple(self._token_ids),
            tuple(self._logprobs),
            self._prompt_logprobs,
            self._num_cached_tokens,
            self.queue_s,
            self._finish,
            self._error,
        )
        self._fresh = False
        self._token_ids = []
        if self._logprobs:
            self._logprobs = []
        self._prompt_logprobs = None
        self._num_cached_tokens = 0
        self._ended = delta.finish is not None
        return delta
