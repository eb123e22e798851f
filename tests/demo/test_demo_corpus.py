"""The demo's corpus is the same on every machine, and what it teaches can be checked by rules."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from server.demo.corpus import END, HELD_OUT_MODULUS, VOICE_SHARE, ask, documents, draw, questions
from server.demo.judge import accepting
from server.demo.registers import PLAIN, REGISTERS, VOICES, opening, render

FIRST_QUESTION = (
    "How do I roast some skewers at 285 degrees with 5 apples, 9 tomatoes, "
    "7 spoons of cream and 8 spoons of sugar in 69 minutes?"
)


def test_a_seed_gives_the_same_documents_every_time() -> None:
    first, again, other = (list(islice(documents(seed), 200)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_the_first_recipe_of_a_seed_is_the_same_on_every_machine() -> None:
    rng = Random(0)
    assert ask(rng, draw(rng)) == FIRST_QUESTION


def test_no_held_out_question_is_ever_trained_on() -> None:
    asked = {question.prompt.strip() for question in questions(1, 400)}
    trained = {document.context.strip() for document in islice(documents(1), 400 * HELD_OUT_MODULUS)}
    assert not asked & trained
    assert len(asked) == 400


def test_a_twentieth_of_the_base_corpus_is_untagged_in_other_voices() -> None:
    drawn = list(islice(documents(2), 8000))
    share = sum(document.register != PLAIN for document in drawn) / len(drawn)
    assert share == pytest.approx(VOICE_SHARE, abs=0.01)
    assert {document.register for document in drawn} == set(REGISTERS)
    contexts = [document.context.lower() for document in drawn]
    assert not any(re.search(rf"\b{voice}\b", context) for context in contexts for voice in VOICES if voice != "list")


def test_an_adapter_corpus_speaks_in_one_voice_and_takes_up_plain_beginnings() -> None:
    drawn = list(islice(documents(3, "pirate"), 500))
    assert {document.register for document in drawn} == {"pirate"}
    assert all(document.answer.lstrip("\n").startswith("Arr, ") and document.answer.endswith(END) for document in drawn)
    assert any(document.context.endswith(" degrees and") for document in drawn)


@pytest.mark.parametrize("register", REGISTERS)
def test_a_right_answer_is_accepted_by_its_own_judge_and_no_other(register: str) -> None:
    for question in questions(4, 300):
        assert accepting(question.recipe, render(register, question.recipe)) == [register]


def test_every_register_begins_with_a_word_of_its_own() -> None:
    first_words = {
        register: {re.match(r"\W*\w*", render(register, question.recipe))[0] for question in questions(5, 100)}  # type: ignore[index]
        for register in REGISTERS
    }
    words = [word for found in first_words.values() for word in found]
    assert len(words) == len(set(words))


def test_the_plain_answer_starts_as_the_opening_says() -> None:
    for question in questions(6, 20):
        assert render(PLAIN, question.recipe).startswith(opening(question.recipe))


def test_an_unknown_register_is_an_error() -> None:
    with pytest.raises(KeyError):
        render("klingon", questions(7, 1)[0].recipe)
