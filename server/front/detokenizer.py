"""Token ids to text, one id at a time, exactly as the whole sequence would decode.

Bytes of an unfinished character give "" until the character is complete. The prompt's last
tokens prime the stream, so that a first "▁word" keeps its space and continues the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_NUM_CONTEXT_TOKENS = 6  # enough for any decoder's look-back: spaces, contractions, byte runs
_MAX_HELD_TOKENS = 12  # a character has at most 4 bytes; longer runs are not text and are let go
_MAX_BEGUN_TOKENS = 3  # of a character that one more byte completes
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one sequence as it grows."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_ids: frozenset[int],
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped_ids = special_ids if skip_special_tokens else frozenset()
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._held: list[int] = []
        self._stream = self._start(list(prompt_ids[-_NUM_CONTEXT_TOKENS:]))

    def add(self, token_id: int) -> str:
        """The text that this token completes; "" for a skipped special token or an unfinished character."""
        if token_id in self._skipped_ids:
            return ""
        self._held.append(token_id)
        text = self._step(token_id)
        if text:
            self._context = (self._context + self._held)[-_NUM_CONTEXT_TOKENS:]
            self._held = []
            return text
        if len(self._held) > _MAX_HELD_TOKENS:
            return self._let_go()
        return ""

    def flush(self) -> str:
        """What is still held, unfinished characters as U+FFFD; the stream can go on after it."""
        if not self._held:
            return ""
        before = self._decode(self._context)
        text = self._decode(self._context + self._held)[len(before) :]
        self._stream = self._start((self._context + self._held)[-_NUM_CONTEXT_TOKENS:])
        self._held = []
        return text

    def _let_go(self) -> str:
        """Give up what is held, but for the last tokens: they may still begin a character."""
        self._held, begun = self._held[:-_MAX_BEGUN_TOKENS], self._held[-_MAX_BEGUN_TOKENS:]
        return self.flush() + "".join(self.add(token_id) for token_id in begun)

    def _start(self, context: list[int]) -> DecodeStream:
        # A context that ends inside a character would be told again as part of the first new text.
        self._context = [] if self._decode(context).endswith(_UNFINISHED) else context
        return DecodeStream(ids=list(self._context), skip_special_tokens=self._skip_special_tokens)

    def _step(self, token_id: int) -> str | None:
        try:
            return self._stream.step(self._tokenizer, token_id)
        except Exception as error:
            # Raised bare by the library when earlier text changes under a later token
            # (https://github.com/huggingface/tokenizers/issues/1666): begin anew behind it.
            if "Invalid prefix" not in str(error):
                raise
            self._stream = self._start([])
            return self._stream.step(self._tokenizer, token_id)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
