"""Tokens that an adapter brings beyond those of its base, from the tokenizer that was saved beside it.

Only the tokens themselves are taken, with their ids: how text is cut is the base's business, and no program of an
uploaded file (an expression, a template) ever runs.

Running example: a base of 32,000 tokens, an adapter whose tokenizer.json adds two
    [AddedToken(32000, "<|im_start|>", True), AddedToken(32001, "<|im_end|>", True)]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENS = 10_000
_MAX_TOKEN_CHARS = 256
_MAX_FILE_BYTES = 128 << 20


class AddedToken(NamedTuple):
    id: int
    text: str
    is_special: bool


class AddedTokens(NamedTuple):
    tokens: list[AddedToken]  # in the order of their ids, which follow the base's without a gap
    warnings: list[str]


def added_tokens(files: Mapping[str, str], base_directory: str) -> AddedTokens:
    """What the adapter's tokenizer adds to the base's; nothing where either has none. Never raises on its account."""
    own, base = files.get(TOKENIZER_FILE), Path(base_directory) / TOKENIZER_FILE
    if own is None or not base_directory or not base.is_file():
        return AddedTokens([], [])
    try:
        listed = _listed(Path(own))
    except (OSError, ValueError, RecursionError) as error:
        return AddedTokens([], [f"its {TOKENIZER_FILE} cannot be read and is left aside: {str(error)[:200]}."])
    known: Any = Tokenizer.from_file(str(base))
    new = sorted(token for token in listed if known.token_to_id(token.text) != token.id)
    first_id = known.get_vocab_size(with_added_tokens=True)
    for place, token in enumerate(new):
        if token.id != first_id + place or known.token_to_id(token.text) is not None:
            sentence = (
                f'its {TOKENIZER_FILE} calls token {token.id} "{token.text[:40]}", which does not continue the '
                "base's tokens; the base's tokenizer is used."
            )
            return AddedTokens([], [sentence])
    return AddedTokens(new, [])


def _listed(path: Path) -> list[AddedToken]:
    """Raises ValueError, OSError."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {_MAX_FILE_BYTES} bytes")
    content = json.loads(path.read_bytes())
    entries = content.get("added_tokens") if isinstance(content, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_TOKENS:
        raise ValueError(f"it lists no added tokens, or more than {MAX_TOKENS}")
    return [_token(entry) for entry in entries]


def _token(entry: Any) -> AddedToken:
    number, text = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
    is_sound = isinstance(number, int) and isinstance(text, str) and 0 < len(text) <= _MAX_TOKEN_CHARS
    if not is_sound or not isinstance(number, int) or not isinstance(text, str):
        raise ValueError("an added token has no id or no text")
    return AddedToken(number, text, entry.get("special") is True)
