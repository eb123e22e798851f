"""One sequence of an answer: the engine's deltas become text, and a stop string ends it.

It knows tokens, text and the stop rule; not adapters, queues or how the request came.
"""

from __future__ import annotations

import time
from typing import NoReturn

from server.engine.delta_stream import DeltaStream
from server.engine.request import EngineErrorRecord, FinishReason, RequestDelta, TokenLogprobs
from server.front.errors import AdapterFailed, DeadlineExceeded, EngineGone, GenerationFailed, InvalidRequest
from server.front.stops import StopStrings
from server.front.text import (
    Alternative,
    GeneratedToken,
    TextDelta,
    TextFinish,
    TextFinishReason,
    TextRequest,
    TextTiming,
)
from server.front.tokenizer import TextTokenizer

_REASONS = {
    FinishReason.LENGTH: TextFinishReason.LENGTH,
    FinishReason.EOS: TextFinishReason.EOS_TOKEN,
    FinishReason.STOP_TOKEN: TextFinishReason.STOP_SEQUENCE,
    FinishReason.ABORTED: TextFinishReason.ABORTED,
}


class SequenceText:
    """Sequence `index` of a request, fed from `stream`; an async iterator of its deltas, the last with a finish."""

    def __init__(
        self,
        request: TextRequest,
        prompt_ids: tuple[int, ...],
        prompt_text: str,
        stream: DeltaStream,
        tokenizer: TextTokenizer,
        index: int,
    ) -> None:
        self.stream = stream
        self._request = request
        self._prompt_ids = prompt_ids
        self._tokenizer = tokenizer
        self._index = index
        self._detokenizer = tokenizer.detokenizer(prompt_ids, request.skip_special_tokens)
        self._stops = StopStrings(request.stop, request.include_stop)
        self._pieces: list[str] = []  # all text released so far
        self._unsent = prompt_text if request.echo else ""  # to go out with the first delta
        self._num_generated = 0
        self._num_cached = 0

    def __aiter__(self) -> SequenceText:
        return self

    async def __anext__(self) -> TextDelta:
        """Raises an error of `server.front.errors` when the engine could not finish the request."""
        return self._take(await anext(self.stream))

    def _take(self, delta: RequestDelta) -> TextDelta:
        self._num_cached = max(self._num_cached, delta.num_cached_tokens)
        if delta.finish is FinishReason.FAILED:
            assert delta.error is not None, "a failure has a reason"
            self._fail(delta.error)
        tokens: list[GeneratedToken] = []
        text, self._unsent = self._unsent, ""
        stop: str | None = None
        for place, token_id in enumerate(delta.token_ids):
            piece = self._detokenizer.add(token_id)
            tokens.append(self._token(token_id, piece, delta.logprobs[place] if delta.logprobs else None))
            released, stop = self._stops.add(piece)
            text += released
            if stop is not None:
                break
        finish = delta.finish
        if stop is None and finish is not None:
            rest = self._detokenizer.flush()
            if tokens:  # the texts of the tokens together are the text
                tokens[-1] = tokens[-1]._replace(text=tokens[-1].text + rest)
            released, stop = self._stops.add(rest)
            text += released + self._stops.flush()
        self._num_generated += len(tokens)
        self._pieces.append(text)
        return TextDelta(text, tuple(tokens), self._prompt_tokens(delta), self._finish(finish, stop), self._index)

    def _finish(self, finish: FinishReason | None, stop: str | None) -> TextFinish | None:
        if stop is None and finish is None:
            return None
        self.stream.leave()
        stream = self.stream
        first_token_s = stream.last_token_s if stream.first_token_s is None else stream.first_token_s
        return TextFinish(
            reason=TextFinishReason.STOP_SEQUENCE if stop is not None or finish is None else _REASONS[finish],
            generated_text="".join(self._pieces),
            num_generated=self._num_generated,
            num_prompt_tokens=len(self._prompt_ids),
            num_cached=self._num_cached,
            seed=self._request.params.seed + self._index,
            stop=stop,
            timing=TextTiming(
                queue_s=stream.queue_s,
                first_token_s=first_token_s - stream.submitted_s,
                total_s=time.monotonic() - stream.submitted_s,
            ),
        )

    def _token(self, token_id: int, piece: str, record: TokenLogprobs | None) -> GeneratedToken:
        special = self._tokenizer.is_special(token_id)
        if record is None:
            return GeneratedToken(token_id, piece, None, special)
        return GeneratedToken(token_id, piece, record.logprob, special, self._alternatives(record))

    def _alternatives(self, record: TokenLogprobs) -> tuple[Alternative, ...]:
        tokenizer = self._tokenizer
        return tuple(
            Alternative(token_id, tokenizer.token_text(token_id), logprob, tokenizer.is_special(token_id))
            for token_id, logprob in record.top
        )

    def _prompt_tokens(self, delta: RequestDelta) -> tuple[GeneratedToken, ...] | None:
        if delta.prompt_logprobs is None:
            return None
        detokenizer = self._tokenizer.detokenizer(skip_special_tokens=False)
        return tuple(
            self._token(token_id, detokenizer.add(token_id), record)
            for token_id, record in zip(self._prompt_ids, delta.prompt_logprobs, strict=True)
        )

    def _fail(self, error: EngineErrorRecord) -> NoReturn:
        if error.kind in ("InvalidRequest", "RequestTooLong"):
            raise InvalidRequest(error.message)
        if error.kind == "DeadlineExceeded":
            raise DeadlineExceeded(
                f"the request had not ended after {self._request.deadline_s} s; "
                f"{self._num_generated} tokens had been generated."
            )
        if error.kind in ("AdapterLoadFailed", "AdapterTooLarge"):
            raise AdapterFailed(error.message)
        if error.kind == "EngineUnavailable" and self._num_generated == 0:
            raise EngineGone(error.message)
        raise GenerationFailed(error.message, error.retryable)
