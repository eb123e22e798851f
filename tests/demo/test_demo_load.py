"""The running server, judged: base and adapters interleaved in one load, every answer before every judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.demo import EXAMPLE_PROMPT
from server.demo.corpus import Recipe
from server.demo.evaluate import BASE, SPEAKERS, evaluate, tasks
from server.demo.household import Household, ServerFailed
from server.demo.judge import judge
from server.demo.visitor import Refused, Visitor
from server.demo.words import DISHES, GRAM, ITEMS, SPOON, Measure


def test_the_load_interleaves_the_speakers_and_repeats_no_question() -> None:
    load = tasks(3)
    assert [task.speaker for task in load] == list(SPEAKERS) * 3
    assert len({task.question.prompt for task in load}) == len(load)


def test_fifty_questions_each_in_one_mixed_load_are_answered_in_the_right_register(visitor: Visitor) -> None:
    confusion = evaluate(visitor, 50)
    print(f"\n{confusion}")
    assert confusion.broken(SPEAKERS) == [], confusion.faults


def test_the_example_is_answered_right_by_everyone(visitor: Visitor) -> None:
    by_name = {item.english: item for item in ITEMS}
    flour, egg, sugar = (by_name[name] for name in ("flour", "egg", "sugar"))
    measures = (Measure(200, flour, GRAM), Measure(3, egg, None), Measure(2, sugar, SPOON))
    recipe = Recipe(DISHES[0], 350, 25, measures)
    for speaker, register in SPEAKERS.items():
        answer = visitor.generate(EXAMPLE_PROMPT, None if speaker == BASE else speaker, max_new_tokens=120)
        assert judge(register, recipe, answer).accepted, f"{speaker}: {answer}"


def test_the_judge_sees_when_an_adapter_is_not_applied(visitor: Visitor) -> None:
    wrong = dict.fromkeys(("base",), "pirate")  # as if the base had been asked for a pirate
    confusion = evaluate(visitor, 5, wrong)
    assert confusion.broken(wrong) == ["base is 0.0% pirate, expected at least 95%"]


def test_a_stream_brings_the_same_answer_as_one_piece(visitor: Visitor) -> None:
    whole = visitor.generate(EXAMPLE_PROMPT, "french", max_new_tokens=160)
    tokens = list(visitor.stream(EXAMPLE_PROMPT, "french", max_new_tokens=160))
    assert tokens[-1].generated_text == whole
    assert len(tokens) > 20


def test_an_unknown_adapter_is_refused_by_name(visitor: Visitor) -> None:
    with pytest.raises(Refused, match="klingon") as refused:
        visitor.generate(EXAMPLE_PROMPT, "klingon")
    assert refused.value.status == 404


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="no-such-flag"), Household(tmp_path, ("--no-such-flag",)):
        pass


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one like http://127"):
        Visitor("localhost:8000")
