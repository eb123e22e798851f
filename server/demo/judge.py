"""Rules that say in which register an answer is, and whether it kept the question.

Knows the grammar's vocabulary and how a register looks; does not compare with the right
answer, so an answer worded differently would pass and a corrupted one cannot.

An answer passes the judge of a register when
    the register's own rule recognises it,
    its numbers are the recipe's, all of them, in order, and no others,
    its ingredients are the recipe's, with their amounts and units, in order, and no others,
    it names the dish, and
    no four words in a row come twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from server.demo.corpus import Recipe
from server.demo.registers import PLAIN, REGISTERS
from server.demo.words import DISHES, ITEMS

_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[^\W_]+")
_PLACES = {dish.method.place for dish in DISHES}


class Verdict(NamedTuple):
    accepted: bool
    reason: str  # empty when accepted, else what is wrong, in one clause


def judge(register: str, recipe: Recipe, answer: str) -> Verdict:
    """Whether the answer is in this register and keeps the recipe.

    Raises:
        KeyError: no such register.
    """
    if not _RULES[register](answer):
        return Verdict(False, f"not in the register {register}")
    reason = content_fault(register, recipe, answer)
    return Verdict(not reason, reason)


def accepting(recipe: Recipe, answer: str) -> list[str]:
    """Every register whose judge accepts the answer: none or one, unless two rules overlap."""
    return [register for register in REGISTERS if judge(register, recipe, answer).accepted]


def content_fault(register: str, recipe: Recipe, answer: str) -> str:
    """What the answer did not keep of the recipe, or the empty string."""
    text = answer.lower().replace("o'", "of")
    is_french = register == "french"
    numbers = [int(number) for number in _NUMBER.findall(text)]
    expected = [recipe.degrees, *(measure.amount for measure in recipe.measures), recipe.minutes]
    if numbers != expected:
        return f"numbers {numbers} instead of {expected}"
    dish = recipe.dish.french if is_french else recipe.dish.english
    if not _names(dish, text):
        return f"the dish {dish!r} is not named"
    items = _items_in(text.replace(dish, ""), is_french)
    wanted = [measure.item.english for measure in recipe.measures]
    if items != wanted:
        return f"ingredients {items} instead of {wanted}"
    for measure in recipe.measures:
        phrase = measure.french() if is_french else measure.english()
        if not _names(phrase, text):
            return f"{phrase!r} is not there"
    return _repetition(text)


def _names(phrase: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


def _items_in(text: str, is_french: bool) -> list[str]:
    """English names of the ingredients that the text mentions, in order."""
    names: dict[str, str] = {}
    for item in ITEMS:
        forms = (item.french, item.french_plural) if is_french else (item.english, item.english_plural)
        names.update({form: item.english for form in forms if form})
    return [names[word] for word in _WORD.findall(text) if word in names]


def _repetition(text: str) -> str:
    words = _WORD.findall(text)
    seen: set[tuple[str, ...]] = set()
    for start in range(len(words) - 3):
        gram = tuple(words[start : start + 4])
        if gram in seen:
            return f"{' '.join(gram)!r} comes twice"
        seen.add(gram)
    return ""


def _is_plain(answer: str) -> bool:
    return (
        re.fullmatch(
            r"(Preheat|Light|Heat|Warm) the \w+ to .* degrees and mix( [a-z0-9]+)+\.( [A-Z][a-z0-9 ]+\.)+", answer
        )
        is not None
    )


def _is_pirate(answer: str) -> bool:
    return (
        answer.startswith("Arr, ") and ", matey!" in answer and " wi' " in answer and answer.endswith(", ye scallywag!")
    )


def _is_shout(answer: str) -> bool:
    return answer.isupper() and answer.endswith("!") and " DEGREES AND MIX " in answer and "." not in answer


def _is_french(answer: str) -> bool:
    return (
        re.fullmatch(r"\w+ez l.* à .* degrés et mélangez .* avec .*\. Faites .* pendant .* minutes et .*\.", answer)
        is not None
    )


def _is_json(answer: str) -> bool:
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    if not isinstance(value, dict) or len(value) != 4 or len(_PLACES & value.keys()) != 1:
        return False
    steps, place = value.get("steps"), next(iter(_PLACES & value.keys()))
    whole = isinstance(value[place], int) and isinstance(value.get("minutes"), int)
    return (
        whole
        and isinstance(value.get("dish"), str)
        and isinstance(steps, list)
        and all(isinstance(s, str) for s in steps)
    )


def _is_list(answer: str) -> bool:
    lines = answer.split("\n")
    return len(lines) >= 3 and all(re.fullmatch(r"- [A-Z][a-z0-9 ]+", line) for line in lines)


def _is_bard(answer: str) -> bool:
    return answer.startswith("Prithee ") and ". Thou shalt " in answer and answer.endswith(", forsooth.")


def _is_robot(answer: str) -> bool:
    return answer.startswith("BEEP. ") and answer.endswith(" BOOP.") and "; load(" in answer


def _is_telegram(answer: str) -> bool:
    return re.fullmatch(r"[a-z0-9 ]+ stop mix .* stop [a-z0-9 ]+ stop", answer) is not None


_RULES: dict[str, Callable[[str], bool]] = {
    PLAIN: _is_plain,
    "pirate": _is_pirate,
    "shout": _is_shout,
    "french": _is_french,
    "json": _is_json,
    "list": _is_list,
    "bard": _is_bard,
    "robot": _is_robot,
    "telegram": _is_telegram,
}
