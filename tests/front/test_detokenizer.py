"""Text that grows token by token is the text of all tokens together."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.front.detokenizer import Detokenizer
from tests.front.letters import BOS, EOS, letters

LETTERS = letters()
SPECIAL = frozenset({BOS, EOS})


def sentencepiece_like() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "a", "!"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_text_arrives_whole(text: str) -> None:
    detokenizer = Detokenizer(LETTERS, SPECIAL)
    token_ids = list(text.encode())
    pieces = [detokenizer.add(token_id) for token_id in token_ids] + [detokenizer.flush()]
    assert "".join(pieces) == text
    assert pieces[-1] == ""  # nothing complete is held to the end


@given(st.lists(st.sampled_from([0x41, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, BOS, EOS]), max_size=60))
@settings(max_examples=200, deadline=None)
@example([0xC3] * 13 + [0xA9])
@example([0x9F] * 10 + [0xF0, 0x9F, 0x98, 0x80])
def test_any_bytes_arrive_as_they_decode_together(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(LETTERS, SPECIAL)
    text = "".join(detokenizer.add(token_id) for token_id in token_ids) + detokenizer.flush()
    whole = LETTERS.decode(token_ids, skip_special_tokens=True)
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_an_unfinished_character_is_empty_until_it_is_complete() -> None:
    detokenizer = Detokenizer(LETTERS, SPECIAL)
    assert [detokenizer.add(byte) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert detokenizer.add(0xF0) == ""
    assert detokenizer.flush() == "\ufffd"  # the end leaves it unfinished
    assert detokenizer.add(ord("a")) == "a"


def test_what_never_becomes_text_is_let_go_in_time() -> None:
    detokenizer = Detokenizer(LETTERS, SPECIAL)
    pieces = [detokenizer.add(0x9F) for _ in range(100)]
    assert len("".join(pieces)) >= 80
    assert max(len(piece) for piece in pieces) <= 13


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    token_ids = [ord("a"), EOS, ord("b")]
    hidden = Detokenizer(LETTERS, SPECIAL)
    assert [hidden.add(token_id) for token_id in token_ids] == ["a", "", "b"]
    shown = Detokenizer(LETTERS, SPECIAL, skip_special_tokens=False)
    assert [shown.add(token_id) for token_id in token_ids] == ["a", "</s>", "b"]


@pytest.mark.parametrize(("prompt", "first"), [([], "world"), (["▁hello"], " world"), (["<s>"], "world")])
def test_the_first_word_continues_the_prompt(prompt: list[str], first: str) -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.get_vocab()
    detokenizer = Detokenizer(tokenizer, frozenset({1, 2}), [ids[piece] for piece in prompt])
    assert detokenizer.add(ids["▁world"]) == first
    assert detokenizer.add(ids["▁hello"]) == " hello"


def test_a_prompt_that_ends_inside_a_character_is_not_repeated() -> None:
    detokenizer = Detokenizer(LETTERS, SPECIAL, [ord("a"), 0xF0, 0x9F])
    text = "".join(detokenizer.add(byte) for byte in b"xyz") + detokenizer.flush()
    assert text == "xyz"


def test_ids_outside_the_vocabulary_are_no_text() -> None:
    detokenizer = Detokenizer(LETTERS, SPECIAL)
    assert [detokenizer.add(token_id) for token_id in (5000, ord("a"), 270, ord("b"))] == ["", "a", "<unused270>", "b"]
