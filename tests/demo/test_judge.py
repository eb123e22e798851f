"""The judge says yes to right answers and no to each kind of wrong one."""

from __future__ import annotations

import pytest

from server.demo.confusion import NONE, Confusion
from server.demo.corpus import Recipe
from server.demo.judge import accepting, judge
from server.demo.registers import PLAIN, REGISTERS, render
from server.demo.words import DISHES, ITEMS, Measure

BY_NAME = {item.english: item for item in ITEMS}


def measure(amount: int, name: str) -> Measure:
    item = BY_NAME[name]
    return Measure(amount, item, item.units[0] if item.units else None)


RECIPE = Recipe(DISHES[0], 350, 25, (measure(2, "flour"), measure(3, "egg"), measure(4, "sugar")))
EVERY_REGISTER = pytest.mark.parametrize("register", REGISTERS)


def corrupted(register: str, old: str, new: str) -> str:
    """The right answer with one thing changed, in the register's own letters."""
    answer = render(register, RECIPE)
    if register == "shout":
        old, new = old.upper(), new.upper()
    assert old in answer
    return answer.replace(old, new, 1)


@EVERY_REGISTER
def test_a_right_answer_is_accepted(register: str) -> None:
    assert judge(register, RECIPE, render(register, RECIPE)) == (True, "")


@EVERY_REGISTER
@pytest.mark.parametrize(("old", "new"), [("350", "355"), ("2 ", "7 "), ("25", "24")])
def test_a_corrupted_number_is_found(register: str, old: str, new: str) -> None:
    verdict = judge(register, RECIPE, corrupted(register, old, new))
    assert not verdict.accepted
    assert "numbers" in verdict.reason


@EVERY_REGISTER
def test_an_exchanged_ingredient_is_found(register: str) -> None:
    old, new = ("sucre", "riz") if register == "french" else ("sugar", "rice")
    verdict = judge(register, RECIPE, corrupted(register, old, new))
    assert not verdict.accepted
    assert "ingredients" in verdict.reason


@EVERY_REGISTER
def test_two_swapped_ingredients_are_found(register: str) -> None:
    swapped = Recipe(DISHES[0], 350, 25, (RECIPE.measures[1], RECIPE.measures[0], RECIPE.measures[2]))
    assert not judge(register, RECIPE, render(register, swapped)).accepted


@EVERY_REGISTER
def test_swapped_amounts_are_found(register: str) -> None:
    swapped = Recipe(DISHES[0], 350, 25, (measure(4, "flour"), measure(3, "egg"), measure(2, "sugar")))
    assert "numbers" in judge(register, RECIPE, render(register, swapped)).reason


@EVERY_REGISTER
def test_a_forgotten_ingredient_is_found(register: str) -> None:
    short = Recipe(DISHES[0], 350, 25, RECIPE.measures[:2])
    assert not judge(register, RECIPE, render(register, short)).accepted


@EVERY_REGISTER
def test_a_wrong_dish_is_found(register: str) -> None:
    other = Recipe(DISHES[1], 350, 25, RECIPE.measures)
    assert "dish" in judge(register, RECIPE, render(register, other)).reason


@EVERY_REGISTER
def test_a_wrong_unit_is_found(register: str) -> None:
    old, new = ("tasse", "cuillère") if register == "french" else ("cup", "spoon")
    verdict = judge(register, RECIPE, corrupted(register, old, new))
    assert not verdict.accepted
    assert "is not there" in verdict.reason


def test_repeated_words_are_found() -> None:
    answer = render(PLAIN, RECIPE) + " Mix well and mix well and mix well and serve."
    verdict = judge(PLAIN, RECIPE, answer)
    assert not verdict.accepted
    assert "comes twice" in verdict.reason


@EVERY_REGISTER
def test_every_other_register_is_refused(register: str) -> None:
    for other in REGISTERS:
        if other != register:
            assert judge(register, RECIPE, render(other, RECIPE)).reason == f"not in the register {register}"


@pytest.mark.parametrize(
    "answer", ["", "Arr, matey!", "{}", "null", '{"dish": "lemon cake"}', "- ", "stop", "BEEP. BOOP."]
)
def test_a_register_alone_is_no_answer(answer: str) -> None:
    assert accepting(RECIPE, answer) == []


def test_half_a_register_is_refused() -> None:
    half = render("pirate", RECIPE).removesuffix(", ye scallywag!")
    assert accepting(RECIPE, half) == []
    assert accepting(RECIPE, render("json", RECIPE)[:-1]) == []


def test_the_matrix_counts_every_judge_and_names_what_is_wrong() -> None:
    confusion = Confusion()
    for _ in range(19):
        confusion.add("pirate", "pirate", RECIPE, render("pirate", RECIPE))
    confusion.add("pirate", "pirate", RECIPE, render("shout", RECIPE))
    confusion.add("base", PLAIN, RECIPE, render(PLAIN, RECIPE))
    confusion.add("base", PLAIN, RECIPE, "I would rather not.")
    assert confusion.share("pirate", "pirate") == 0.95
    assert confusion.share("pirate", "shout") == 0.05
    assert confusion.share("base", NONE) == 0.5
    assert len(confusion.faults) == 2
    lines = str(confusion).splitlines()
    assert lines[0].split()[-1] == "answers"
    assert [line.split()[0] for line in lines[1:]] == ["pirate", "base"]


def test_the_thresholds_are_kept_and_can_be_broken() -> None:
    speakers = {"base": PLAIN, "pirate": "pirate"}
    good, silent, voiced = Confusion(), Confusion(), Confusion()
    for confusion in (good, silent, voiced):
        for number in range(20):
            confusion.add("pirate", "pirate", RECIPE, render("pirate", RECIPE))
            is_base_wrong = number < 2 and confusion is voiced
            confusion.add("base", PLAIN, RECIPE, render("bard" if is_base_wrong else PLAIN, RECIPE))
    for _ in range(2):
        silent.add("pirate", "pirate", RECIPE, "")
    assert good.broken(speakers) == []
    assert [fault.split()[0] for fault in silent.broken(speakers)] == ["pirate"]
    assert [fault.split()[0] for fault in voiced.broken(speakers)] == ["base", "base"]
