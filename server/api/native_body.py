"""The native answer: the JSON of `/generate` and the events of its stream, from the deltas of the front.

It knows shapes only; nothing here waits or fails. Dicts, not models: an event is built per token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from server.api.schemas import Parameters
from server.front.text import Alternative, GeneratedToken, TextDelta, TextFinish

_encode = json.JSONEncoder(separators=(",", ":")).encode
_quote = json.encoder.encode_basestring_ascii
_NO_LOGPROB = -9999.0


@dataclass(slots=True)
class Answer:
    """One sequence, collected."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    prompt_tokens: tuple[GeneratedToken, ...] = ()
    finish: TextFinish | None = None

    def add(self, delta: TextDelta) -> None:
        self.tokens += delta.tokens
        if delta.prompt_tokens is not None:
            self.prompt_tokens = delta.prompt_tokens
        if delta.finish is not None:
            self.finish = delta.finish

    @property
    def mean_logprob(self) -> float:
        if not self.tokens:
            return _NO_LOGPROB
        return sum(_logprob(token) for token in self.tokens) / len(self.tokens)


class Shape:
    """Which optional parts one request asked for."""

    def __init__(self, parameters: Parameters | None, *, is_greedy: bool, has_details: bool) -> None:
        self.has_details = has_details
        self._is_greedy = is_greedy
        self._num_top = (parameters.top_n_tokens if parameters else None) or 0
        self._num_alternatives = (parameters.return_k_alternatives if parameters else None) or 0

    def reply(self, answers: list[Answer]) -> dict[str, Any]:
        """The body of an answer that is not streamed; of several sequences the likeliest is the answer."""
        best = max(answers, key=lambda answer: answer.mean_logprob)
        assert best.finish is not None
        body: dict[str, Any] = {"generated_text": best.finish.generated_text}
        if not self.has_details:
            return body
        details = self._details(best, best.finish)
        others = [answer for answer in answers if answer is not best]
        if others:
            details["best_of_sequences"] = [self._other(answer) for answer in others]
        body["details"] = details
        return body

    def events(self, delta: TextDelta, num_before: int) -> bytes:
        """The events of one delta, one a token; the last one of the stream carries the whole text.

        `num_before` tokens were sent before, so the first event has index `num_before + 1`.
        """
        lines = []
        tokens = delta.tokens or ((_NOTHING,) if delta.finish else ())
        for index, token in enumerate(tokens, start=num_before + 1):
            is_last = delta.finish is not None and index == num_before + len(tokens)
            lines.append(f"data: {self._event(index, token, delta.finish if is_last else None)}\n\n")
        return "".join(lines).encode("ascii")

    def _event(self, index: int, token: GeneratedToken, finish: TextFinish | None) -> str:
        text, details = "null", "null"
        if finish is not None:
            text = _quote(finish.generated_text)
            if self.has_details:
                details = _encode(self._stream_details(finish))
        top = ""
        if self._num_top:
            top = f',"top_tokens":{_encode(self._top(token))}'
        return f'{{"index":{index},"token":{self._token_json(token)}{top},"generated_text":{text},"details":{details}}}'

    def _token_json(self, token: GeneratedToken) -> str:
        if self._num_alternatives:
            return _encode(self._token(token))
        special = "true" if token.special else "false"
        return f'{{"id":{token.id},"text":{_quote(token.text)},"logprob":{_logprob(token)!r},"special":{special}}}'

    def _token(self, token: GeneratedToken) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": token.id,
            "text": token.text,
            "logprob": _logprob(token),
            "special": token.special,
        }
        if self._num_alternatives:
            body["alternative_tokens"] = [
                {"id": other.id, "text": other.text, "logprob": other.logprob}
                for other in _others(token.top, self._num_alternatives)
            ]
        return body

    def _top(self, token: GeneratedToken) -> list[dict[str, Any]]:
        return [alternative._asdict() for alternative in _others(token.top, self._num_top)]

    def _details(self, answer: Answer, finish: TextFinish) -> dict[str, Any]:
        body = {
            "finish_reason": str(finish.reason),
            "generated_tokens": finish.num_generated,
            "prompt_tokens": finish.num_prompt_tokens,
            "skipped_tokens": finish.num_cached,
            "seed": self._seed(finish),
            "prefill": [{"id": t.id, "text": t.text, "logprob": t.logprob} for t in answer.prompt_tokens],
            "tokens": [self._token(token) for token in answer.tokens],
        }
        if self._num_top:
            body["top_tokens"] = [self._top(token) for token in answer.tokens]
        return body

    def _other(self, answer: Answer) -> dict[str, Any]:
        assert answer.finish is not None
        details = self._details(answer, answer.finish)
        for name in ("prompt_tokens", "skipped_tokens"):
            del details[name]
        return {"generated_text": answer.finish.generated_text, **details}

    def _stream_details(self, finish: TextFinish) -> dict[str, Any]:
        return {
            "finish_reason": str(finish.reason),
            "generated_tokens": finish.num_generated,
            "prompt_tokens": finish.num_prompt_tokens,
            "input_length": finish.num_prompt_tokens,
            "seed": self._seed(finish),
        }

    def _seed(self, finish: TextFinish) -> int | None:
        return None if self._is_greedy else finish.seed


_NOTHING = GeneratedToken(id=0, text="", logprob=0.0, special=True)


def _others(top: Iterable[Alternative], number: int) -> Iterator[Alternative]:
    for rank, alternative in enumerate(top):
        if rank == number:
            return
        yield alternative


def _logprob(token: GeneratedToken) -> float:
    return _NO_LOGPROB if token.logprob is None else token.logprob
