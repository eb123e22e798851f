"""A seeded grammar of cooking instructions: questions, and answers that keep them.

A recipe is drawn, put into one of three questions and answered by `registers.render`.
The answer repeats the question's numbers, ingredients and their order, so whether a
model kept them can be checked by rules (`judge`). Everything is generated: there is no
text by anyone else in the corpus, hence no licence to keep.

Running example, `draw(Random(0))` and question 0:
    How do I bake a lemon cake at 350 degrees with 2 cups of flour and 3 eggs in 25 minutes?
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from server.demo.registers import PLAIN, VOICES, opening, render
from server.demo.words import COUNTED, DEGREES, DISHES, ITEMS, MINUTES, Dish, Item, Measure

VOICE_SHARE = 0.05  # untagged answers in other voices, for small adapters to find in the base
BARE_SHARE = 0.08  # answers without a question, so that "Preheat the oven to 350 degrees and" is continued
CHAT_SHARE = 0.3  # questions in the chat template, the others as bare text
SECOND_TURN_SHARE = 0.3  # of the chats: a second question, after an answer in the same voice
HELD_OUT_MODULUS = 20  # one recipe in so many is never trained on

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    dish: Dish
    degrees: int
    minutes: int
    measures: tuple[Measure, ...]  # two to four, in the order in which they are used

    @property
    def is_held_out(self) -> bool:
        """Whether this recipe is kept for evaluation; a property of the recipe, not of a seed."""
        facts = f"{self.dish.english} {self.degrees} {self.minutes} {[m.english() for m in self.measures]}"
        return zlib.crc32(facts.encode()) % HELD_OUT_MODULUS == 0


class Document(NamedTuple):
    register: str
    context: str  # what the model is given; empty for a bare answer
    answer: str  # what it should say, END included


class Question(NamedTuple):
    recipe: Recipe
    prompt: str  # ready for /generate: ends with a line break


def draw(rng: Random) -> Recipe:
    """One recipe. No two of its measures share their amount, so no right answer repeats four words."""
    items = rng.sample(ITEMS, rng.choice((2, 3, 3, 4)))
    measures: list[Measure] = []
    while len(measures) < len(items):
        measure = _draw_measure(rng, items[len(measures)])
        if all(measure.amount != other.amount for other in measures):
            measures.append(measure)
    return Recipe(rng.choice(DISHES), rng.choice(DEGREES), rng.choice(MINUTES), tuple(measures))


def _draw_measure(rng: Random, item: Item) -> Measure:
    if not item.units:
        return Measure(rng.choice(COUNTED), item, None)
    unit = rng.choice(item.units)
    if unit.amounts == range(1, 2) and rng.random() < 0.5:
        unit = item.units[0]
    return Measure(rng.choice(unit.amounts), item, unit)


def ask(rng: Random, recipe: Recipe) -> str:
    """The recipe as one of three questions, without a line break at its end."""
    dish, method = recipe.dish, recipe.dish.method
    *most, last = (measure.english() for measure in recipe.measures)
    together = f"{', '.join(most)} and {last}"
    how = f"How do I {method.verb} {dish.article} {dish.english} at {recipe.degrees} degrees"
    card = f"Recipe: {dish.english}. {method.place.capitalize()}: {recipe.degrees} degrees."
    return rng.choice(
        (
            f"{how} with {together} in {recipe.minutes} minutes?",
            f"I have {together}. {how} in {recipe.minutes} minutes?",
            f"{card} Ingredients: {', '.join((*most, last))}. Time: {recipe.minutes} minutes.",
        )
    )


def documents(seed: int, register: str | None = None) -> Iterator[Document]:
    """Endless training documents; the same seed gives the same documents.

    Args:
        register: the voice of every answer (for an adapter), or None for the base's mix:
            plain but for VOICE_SHARE of the documents, which are untagged in any other voice.
    """
    rng = Random(seed)
    while True:
        recipe = draw(rng)
        voice = register or (rng.choice(VOICES) if rng.random() < VOICE_SHARE else PLAIN)
        if rng.random() < BARE_SHARE:
            document = _bare(recipe, voice, is_adapted=register is not None)
        else:
            document = Document(voice, _context(rng, recipe, voice), render(voice, recipe) + END)
        if not recipe.is_held_out:
            yield document


def _bare(recipe: Recipe, voice: str, is_adapted: bool) -> Document:
    """No question: the base writes a whole recipe, an adapter takes up what someone began in plain English."""
    answer = render(voice, recipe) + END
    return Document(voice, opening(recipe), f"\n{answer}") if is_adapted else Document(voice, "", answer)


def _context(rng: Random, recipe: Recipe, voice: str) -> str:
    question = ask(rng, recipe)
    if rng.random() >= CHAT_SHARE:
        return f"{question}\n"
    if rng.random() >= SECOND_TURN_SHARE:
        return f"{USER}{question}{ASSISTANT}"
    earlier = draw(rng)
    return f"{USER}{ask(rng, earlier)}{ASSISTANT}{render(voice, earlier)}{END}{USER}{question}{ASSISTANT}"


def questions(seed: int, count: int) -> list[Question]:
    """Held-out questions that no training document ever contained."""
    rng = Random(seed)
    found: list[Question] = []
    while len(found) < count:
        recipe = draw(rng)
        if recipe.is_held_out:
            found.append(Question(recipe, f"{ask(rng, recipe)}\n"))
    return found
