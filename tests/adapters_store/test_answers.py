"""Answers that are kept for requests that may come again: for a day, within bounds, one claim a key."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapters_store import answers
from adapters_store.answers import Answer, AnswerBook
from adapters_store.catalog import Catalog

ANSWER = Answer("head", "body", 201, {"location": "/x"}, b'{"version": 3}')
KEY, OTHER = "a" * 64, "b" * 64


def test_an_answer_is_found_by_its_key_in_every_process(catalog: Catalog, store: Path) -> None:
    AnswerBook(store).keep(KEY, ANSWER)
    assert AnswerBook(store).find(KEY) == ANSWER
    assert AnswerBook(store).find(OTHER) is None


def test_an_answer_is_forgotten_after_a_day(catalog: Catalog, store: Path) -> None:
    book = AnswerBook(store)
    book.keep(KEY, ANSWER)
    path = store / "answers" / f"{KEY}.json"
    os.utime(path, (time.time() - answers.KEEP_S - 1,) * 2)
    assert book.find(KEY) is None
    assert book.sweep() == 1
    assert not path.exists()


def test_the_oldest_go_where_newer_ones_want_the_room(
    catalog: Catalog, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = AnswerBook(store)
    for number in range(6):
        book.keep(f"{number:064x}", ANSWER)
        os.utime(store / "answers" / f"{number:064x}.json", (time.time() - 100 + number,) * 2)
    assert book.sweep() == 0
    monkeypatch.setattr(answers, "MAX_ANSWERS", 4)
    assert book.sweep() == 2
    size = (store / "answers" / f"{5:064x}.json").stat().st_size
    monkeypatch.setattr(answers, "MAX_BYTES", 2 * size)
    assert book.sweep() == 2
    monkeypatch.setattr(answers, "MAX_BYTES", 1)
    assert book.sweep() == 1, "the newest stays whatever its size"
    assert book.find(f"{5:064x}") == ANSWER


@pytest.mark.parametrize("text", ["", "{", "{}", '{"head": 1}', "[]"])
def test_what_a_crash_left_of_an_answer_is_none(catalog: Catalog, store: Path, text: str) -> None:
    book = AnswerBook(store)
    book.keep(KEY, ANSWER)
    (store / "answers" / f"{KEY}.json").write_text(text)
    assert book.find(KEY) is None


def test_a_key_is_claimed_once_and_again_when_its_holder_ends(catalog: Catalog, store: Path) -> None:
    book = AnswerBook(store)
    claim = book.claim(KEY)
    assert claim is not None
    assert AnswerBook(store).claim(KEY) is None
    free = book.claim(OTHER)
    assert free is not None
    free.release()
    claim.release()
    claim.release()
    script = f"from pathlib import Path\nfrom adapters_store.answers import AnswerBook\n\
print(AnswerBook(Path({str(store)!r})).claim({KEY!r}) is not None, flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert book.claim(KEY) is None
        other.kill()
    again = book.claim(KEY)
    assert again is not None, "it ended with its process"
    again.release()
