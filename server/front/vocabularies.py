"""Tokenizers of adapters that bring tokens of their own: the base's, and a few ids more."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from server.front.tokenizer import TextTokenizer

MAX_KEPT = 8  # each holds the base's vocabulary once more

Tokens = tuple[tuple[int, str, bool], ...]  # (id, text, whether it is special), in the order of their ids


class Vocabularies:
    """Gives each request its tokenizer. Belongs to one event loop; the least recently used of a few are kept."""

    def __init__(self, base: TextTokenizer) -> None:
        self.base = base
        self._kept: OrderedDict[Tokens, TextTokenizer] = OrderedDict()

    async def of(self, report: Mapping[str, Any] | None) -> TextTokenizer:
        """The tokenizer of an adapter with this load report; the base's where it adds no tokens."""
        added = (report or {}).get("added_tokens")
        if not added:
            return self.base
        tokens: Tokens = tuple((number, text, is_special) for number, text, is_special in added)
        if tokens not in self._kept:
            made = await asyncio.to_thread(self.base.extended, tokens)
            self._kept[tokens] = made
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(tokens)
        return self._kept[tokens]
