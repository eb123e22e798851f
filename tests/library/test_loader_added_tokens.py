"""Which tokens of an adapter's tokenizer are taken, and which are left aside with a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.loader.added_tokens import MAX_TOKENS, AddedToken, added_tokens
from tests.front.letters import letters, save_letters


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    return save_letters(tmp_path / "base")


def tokenizer_with(directory: Path, *tokens: dict[str, Any]) -> dict[str, str]:
    content = json.loads(letters().to_str())
    content["added_tokens"] += tokens
    path = directory / "own.json"
    path.write_text(json.dumps(content))
    return {"tokenizer.json": str(path)}


def test_tokens_behind_the_base_s_are_taken_in_order(base: Path, tmp_path: Path) -> None:
    files = tokenizer_with(tmp_path, {"id": 301, "content": "<b>"}, {"id": 300, "content": "<a>", "special": True})
    tokens, warnings = added_tokens(files, str(base))
    assert (tokens, warnings) == ([AddedToken(300, "<a>", True), AddedToken(301, "<b>", False)], [])


def test_the_base_s_own_tokenizer_adds_nothing(base: Path, tmp_path: Path) -> None:
    assert added_tokens(tokenizer_with(tmp_path), str(base)) == ([], [])
    assert added_tokens({}, str(base)) == ([], [])
    assert added_tokens(tokenizer_with(tmp_path), "") == ([], [])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([{"id": 302, "content": "<gap>"}], "does not continue"),
        ([{"id": 5, "content": "<renamed>"}], "does not continue"),
        ([{"id": 300, "content": "</s>"}], "does not continue"),
        ([{"id": 300, "content": ""}], "no text"),
        ([{"id": "300", "content": "<a>"}], "no id"),
        ([{"id": 300, "content": "x" * 1000}], "no text"),
        ([{"id": 300 + i, "content": f"<{i}>"} for i in range(MAX_TOKENS + 1)], "more than"),
    ],
)
def test_what_does_not_fit_is_left_aside_with_a_sentence(
    base: Path, tmp_path: Path, tokens: list[dict[str, Any]], words: str
) -> None:
    found, warnings = added_tokens(tokenizer_with(tmp_path, *tokens), str(base))
    assert found == []
    assert words in warnings[0]


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"added_tokens": 3}', '{"added_tokens": [[]]}'])
def test_a_tokenizer_that_is_none_is_left_aside(base: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "own.json").write_text(text)
    found, warnings = added_tokens({"tokenizer.json": str(tmp_path / "own.json")}, str(base))
    assert (found, len(warnings)) == ([], 1)
