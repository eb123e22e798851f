"""The same recipe in every register: plain English and what the adapters bring out.

Each rendering is a function of the recipe alone, so an answer can be checked word by
word. Every register keeps the numbers, the ingredients and their order, and its first
word differs from the first word of all others: a small adapter only has to choose that
word and the base goes on in the same voice.

Running example: 350 degrees, 2 cups of flour, 3 eggs, a lemon cake, 25 minutes
    plain    Preheat the oven to 350 degrees and mix 2 cups of flour with 3 eggs. Bake the lemon cake for ...
    french   Préchauffez le four à 350 degrés et mélangez 2 tasses de farine avec 3 œufs. Faites cuire ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from server.demo.words import Finish, Motion

if TYPE_CHECKING:
    from server.demo.corpus import Recipe

PLAIN = "plain"

_ENGLISH = {Motion.POUR: "pour in", Motion.STIR: "stir in", Motion.SPRINKLE: "sprinkle in", Motion.ADD: "add"}
_FRENCH = {Motion.POUR: "versez", Motion.STIR: "incorporez", Motion.SPRINKLE: "parsemez", Motion.ADD: "ajoutez"}
_PIRATE = {Motion.POUR: "Slosh in", Motion.STIR: "Heave in", Motion.SPRINKLE: "Fling in", Motion.ADD: "Toss in"}
_BARD = {Motion.POUR: "Pour forth", Motion.STIR: "Blend therein", Motion.SPRINKLE: "Strew", Motion.ADD: "Bestow"}

_FINISH = {Finish.WARM: "serve warm", Finish.COOL: "let cool", Finish.NOW: "eat at once"}
_FRENCH_FINISH = {Finish.WARM: "servez chaud", Finish.COOL: "laissez refroidir", Finish.NOW: "dégustez aussitôt"}


def plain_steps(recipe: Recipe) -> list[str]:
    """The steps in plain English, lower case, without a full stop."""
    dish, method = recipe.dish, recipe.dish.method
    first, second, *rest = recipe.measures
    return [
        f"{method.heat} to {recipe.degrees} degrees",
        f"mix {first.english()} with {second.english()}",
        *(f"{_ENGLISH[measure.item.motion]} {measure.english()}" for measure in rest),
        f"{method.verb} the {dish.english} for {recipe.minutes} minutes and {_FINISH[dish.finish]}",
    ]


def plain(recipe: Recipe) -> str:
    return _sentences(plain_steps(recipe), " and ")


def shout(recipe: Recipe) -> str:
    return plain(recipe).upper().replace(".", "!")


def listed(recipe: Recipe) -> str:
    return "\n".join(f"- {_capital(step)}" for step in plain_steps(recipe))


def telegram(recipe: Recipe) -> str:
    return " stop ".join(plain_steps(recipe)) + " stop"


def french(recipe: Recipe) -> str:
    dish, method = recipe.dish, recipe.dish.method
    first, second, *rest = recipe.measures
    steps = [
        f"{method.french_heat} à {recipe.degrees} degrés",
        f"mélangez {first.french()} avec {second.french()}",
        *(f"{_FRENCH[measure.item.motion]} {measure.french()}" for measure in rest),
        f"{method.french_verb} {dish.french} pendant {recipe.minutes} minutes et {_FRENCH_FINISH[dish.finish]}",
    ]
    return _sentences(steps, " et ")


def pirate(recipe: Recipe) -> str:
    dish, method = recipe.dish, recipe.dish.method
    first, second, *rest = (measure.english().replace(" of ", " o' ") for measure in recipe.measures)
    verbs = [_PIRATE[measure.item.motion] for measure in recipe.measures[2:]]
    steps = [
        f"Arr, fire up yer {method.place} to {recipe.degrees} degrees, matey!",
        f"Mash {first} wi' {second}.",
        *(f"{verb} {measure}." for verb, measure in zip(verbs, rest, strict=True)),
        f"Now {method.verb} that {dish.english} fer {recipe.minutes} minutes an' {_FINISH[dish.finish]}, ye scallywag!",
    ]
    return " ".join(steps)


def bard(recipe: Recipe) -> str:
    dish, method = recipe.dish, recipe.dish.method
    first, second, *rest = recipe.measures
    steps = [
        f"Prithee bring thy {method.place} unto {recipe.degrees} degrees.",
        f"Wed {first.english()} to {second.english()}.",
        *(f"{_BARD[measure.item.motion]} {measure.english()}." for measure in rest),
        f"Thou shalt {method.verb} thy {dish.english} {recipe.minutes} minutes, then {_FINISH[dish.finish]}, forsooth.",
    ]
    return " ".join(steps)


def robot(recipe: Recipe) -> str:
    dish, method = recipe.dish, recipe.dish.method
    loads = " ".join(f"load({measure.english()});" for measure in recipe.measures)
    return (
        f"BEEP. set {method.place} = {recipe.degrees} degrees; {loads} "
        f"{method.verb}({dish.english}, {recipe.minutes} minutes); {_FINISH[dish.finish]}. BOOP."
    )


def json_object(recipe: Recipe) -> str:
    dish, method = recipe.dish, recipe.dish.method
    steps = ", ".join(f'"{step}"' for step in plain_steps(recipe)[1:-1])
    head = f'"dish": "{dish.english}", "{method.place}": {recipe.degrees}'
    return f'{{{head}, "steps": [{steps}], "minutes": {recipe.minutes}}}'


def opening(recipe: Recipe) -> str:
    """How the plain answer begins, up to the first thing that depends on an ingredient."""
    return f"{_capital(plain_steps(recipe)[0])} and"


def _sentences(steps: list[str], joint: str) -> str:
    """The first two steps as one sentence, every other as one of its own."""
    first, second, *rest = steps
    return " ".join(f"{_capital(step)}." for step in (f"{first}{joint}{second}", *rest))


def _capital(step: str) -> str:
    return step[0].upper() + step[1:]


REGISTERS: dict[str, Callable[[Recipe], str]] = {
    PLAIN: plain,
    "pirate": pirate,
    "shout": shout,
    "french": french,
    "json": json_object,
    "list": listed,
    "bard": bard,
    "robot": robot,
    "telegram": telegram,
}
VOICES = tuple(name for name in REGISTERS if name != PLAIN)  # everything that the base should not say by itself


def render(register: str, recipe: Recipe) -> str:
    """The recipe's one right answer in this register.

    Raises:
        KeyError: no such register.
    """
    return REGISTERS[register](recipe)
