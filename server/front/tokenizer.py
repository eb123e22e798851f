"""The base model's tokenizer without torch: text to ids, single ids to text, chat templates.

transformers reads the files, so special tokens, post-processing and templates mean what they mean there;
`PreTrainedTokenizerFast` needs no torch, while `AutoTokenizer` would import it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from server.front.detokenizer import Detokenizer
from server.front.errors import CannotStart, InvalidRequest, TemplateFailed

_ADVICE = "It needs a tokenizer.json; AutoTokenizer.from_pretrained(...).save_pretrained(DIR) writes one."
_LONG_TEXT_CHARS = 16_384  # longer ones are encoded on a thread, so that the event loop goes on


class TextTokenizer:
    """Wraps one loaded tokenizer; safe for concurrent use, changes nothing after it was made."""

    def __init__(self, backend: Tokenizer, special_ids: frozenset[int], template: Any = None) -> None:
        """`template` is the transformers tokenizer that renders chats, or None."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_ids = special_ids
        self._template = template
        self._token_texts: dict[int, str] = {}

    @classmethod
    async def load(cls, model: str, revision: str | None = None) -> TextTokenizer:
        """From a directory or a hub id. Raises CannotStart."""
        return await asyncio.to_thread(_load, model, revision)

    def extended(self, tokens: Sequence[tuple[int, str, bool]]) -> TextTokenizer:
        """This tokenizer with tokens behind its last one: (id, text, whether it is special). Takes a while."""
        backend = Tokenizer.from_str(self.backend.to_str())
        for number, text, is_special in tokens:
            backend.add_tokens([AddedToken(text, special=is_special, normalized=False)])
            assert backend.token_to_id(text) == number, "the loader takes only tokens that follow the base's"
        special = frozenset(number for number, _, is_special in tokens if is_special)
        return TextTokenizer(backend, self.special_ids | special, self._template)

    @property
    def num_tokens(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None and self._template.chat_template is not None

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Raises InvalidRequest for text that is no Unicode."""
        if len(text) > _LONG_TEXT_CHARS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)
        return self._encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """The text of one token alone; special tokens by their name, ids outside the vocabulary as ""."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    def detokenizer(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self.backend, self.special_ids, prompt_ids, skip_special_tokens)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation; it brings its own special tokens, so encode it without adding any.

        Raises:
            TemplateFailed: the model has no chat template, or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise TemplateFailed("this model has no chat template; send the prompt as one text instead.")
        try:
            text = self._template.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # a template is a program of the model's: it may raise anything
            raise TemplateFailed(f"the chat template refused the messages: {error}") from error
        return str(text)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the prompt holds an unpaired surrogate at character {error.start}, which no text can contain."
            ) from error
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids


def require_tokenizer(directory: Path) -> None:
    """Raises CannotStart if a model's directory has no tokenizer that can be loaded."""
    if not (directory / "tokenizer.json").is_file():
        raise CannotStart(f"no usable tokenizer in {directory}. {_ADVICE}")


def _load(model: str, revision: str | None) -> TextTokenizer:
    from transformers import PreTrainedTokenizerFast  # takes a second, so only where a tokenizer is loaded

    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(model, revision=revision or "main")
    except Exception as error:  # missing files, network, broken JSON: all of it ends in the same advice
        raise CannotStart(f"no usable tokenizer in {model} ({error}). {_ADVICE}") from error
    return TextTokenizer(loaded.backend_tokenizer, frozenset(loaded.all_special_ids), loaded)
