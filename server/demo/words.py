"""The closed vocabulary of the demo: ingredients, units, dishes and ways of cooking.

Knows every noun and verb that the demo's language has, in English and in French, and
nothing about sentences: `registers` builds those, `corpus` draws what goes in them.

Running example: Measure(2, FLOUR, CUP) is "2 cups of flour" and "2 tasses de farine".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Motion(StrEnum):
    """How an ingredient joins the others; every register has a verb for each."""

    POUR = "pour"
    STIR = "stir"
    SPRINKLE = "sprinkle"
    ADD = "add"


class Finish(StrEnum):
    """What happens when the time is up."""

    WARM = "warm"
    COOL = "cool"
    NOW = "now"


@dataclass(frozen=True, slots=True)
class Unit:
    english: str  # singular; the plural takes an s in both languages
    french: str
    amounts: range  # what a recipe may ask for


@dataclass(frozen=True, slots=True)
class Item:
    english: str
    french: str
    motion: Motion
    units: tuple[Unit, ...] = ()  # empty: counted, one by one
    english_plural: str = ""  # counted items only
    french_plural: str = ""


@dataclass(frozen=True, slots=True)
class Method:
    verb: str  # bake
    french_verb: str  # faites cuire
    place: str  # oven
    heat: str  # preheat the oven
    french_heat: str


@dataclass(frozen=True, slots=True)
class Dish:
    english: str
    article: str  # in a question: "a lemon cake", "some bread"
    french: str  # with its article: "le gâteau au citron"
    method: Method
    finish: Finish


@dataclass(frozen=True, slots=True)
class Measure:
    amount: int
    item: Item
    unit: Unit | None  # None: counted

    def english(self) -> str:
        if self.unit is None:
            return f"{self.amount} {self.item.english if self.amount == 1 else self.item.english_plural}"
        return f"{self.amount} {self.unit.english}{_plural(self.amount)} of {self.item.english}"

    def french(self) -> str:
        if self.unit is None:
            return f"{self.amount} {self.item.french if self.amount == 1 else self.item.french_plural}"
        link = "d'" if self.item.french[0] in "aeiouhéœ" else "de "
        return f"{self.amount} {self.unit.french}{_plural(self.amount)} {link}{self.item.french}"


def _plural(amount: int) -> str:
    return "" if amount == 1 else "s"


COUNTED = range(1, 10)
CUP = Unit("cup", "tasse", range(1, 10))
SPOON = Unit("spoon", "cuillère", range(1, 10))
PINCH = Unit("pinch", "pincée", range(1, 2))
GRAM = Unit("gram", "gramme", range(20, 900, 10))

ITEMS = (
    Item("flour", "farine", Motion.STIR, (CUP, GRAM)),
    Item("sugar", "sucre", Motion.STIR, (CUP, SPOON, GRAM)),
    Item("cocoa", "cacao", Motion.STIR, (SPOON, GRAM)),
    Item("yeast", "levure", Motion.STIR, (SPOON, GRAM)),
    Item("oats", "avoine", Motion.STIR, (CUP, GRAM)),
    Item("rice", "riz", Motion.STIR, (CUP, GRAM)),
    Item("salt", "sel", Motion.SPRINKLE, (SPOON, PINCH)),
    Item("pepper", "poivre", Motion.SPRINKLE, (SPOON, PINCH)),
    Item("cinnamon", "cannelle", Motion.SPRINKLE, (SPOON, PINCH)),
    Item("ginger", "gingembre", Motion.SPRINKLE, (SPOON, PINCH)),
    Item("basil", "basilic", Motion.SPRINKLE, (SPOON, GRAM)),
    Item("milk", "lait", Motion.POUR, (CUP, SPOON)),
    Item("water", "eau", Motion.POUR, (CUP, SPOON)),
    Item("cream", "crème", Motion.POUR, (CUP, SPOON)),
    Item("oil", "huile", Motion.POUR, (CUP, SPOON)),
    Item("honey", "miel", Motion.POUR, (SPOON, GRAM)),
    Item("butter", "beurre", Motion.ADD, (SPOON, GRAM)),
    Item("cheese", "fromage", Motion.ADD, (CUP, GRAM)),
    Item("spinach", "épinards", Motion.ADD, (CUP, GRAM)),
    Item("lentils", "lentilles", Motion.ADD, (CUP, GRAM)),
    Item("raisins", "raisins", Motion.ADD, (SPOON, GRAM)),
    Item("almonds", "amandes", Motion.ADD, (CUP, GRAM)),
    Item("egg", "œuf", Motion.ADD, (), "eggs", "œufs"),
    Item("lemon", "citron", Motion.ADD, (), "lemons", "citrons"),
    Item("apple", "pomme", Motion.ADD, (), "apples", "pommes"),
    Item("banana", "banane", Motion.ADD, (), "bananas", "bananes"),
    Item("onion", "oignon", Motion.ADD, (), "onions", "oignons"),
    Item("carrot", "carotte", Motion.ADD, (), "carrots", "carottes"),
    Item("tomato", "tomate", Motion.ADD, (), "tomatoes", "tomates"),
    Item("mushroom", "champignon", Motion.ADD, (), "mushrooms", "champignons"),
)

BAKE = Method("bake", "faites cuire", "oven", "preheat the oven", "préchauffez le four")
ROAST = Method("roast", "faites rôtir", "grill", "light the grill", "allumez le gril")
FRY = Method("fry", "faites frire", "pan", "heat the pan", "chauffez la poêle")
SIMMER = Method("simmer", "faites mijoter", "pot", "warm the pot", "tiédissez la marmite")

DISHES = (
    Dish("lemon cake", "a", "le gâteau au citron", BAKE, Finish.COOL),
    Dish("apple pie", "an", "la tarte aux pommes", BAKE, Finish.WARM),
    Dish("bread", "some", "le pain", BAKE, Finish.COOL),
    Dish("muffins", "some", "les muffins", BAKE, Finish.COOL),
    Dish("pizza", "a", "la pizza", BAKE, Finish.NOW),
    Dish("skewers", "some", "les brochettes", ROAST, Finish.NOW),
    Dish("vegetables", "some", "les légumes", ROAST, Finish.WARM),
    Dish("stuffed squash", "a", "la courge farcie", ROAST, Finish.WARM),
    Dish("pancakes", "some", "les crêpes", FRY, Finish.WARM),
    Dish("omelette", "an", "l'omelette", FRY, Finish.NOW),
    Dish("fritters", "some", "les beignets", FRY, Finish.COOL),
    Dish("soup", "a", "la soupe", SIMMER, Finish.WARM),
    Dish("stew", "a", "le ragoût", SIMMER, Finish.WARM),
    Dish("curry", "a", "le curry", SIMMER, Finish.NOW),
    Dish("jam", "some", "la confiture", SIMMER, Finish.COOL),
)

DEGREES = range(150, 480, 5)
MINUTES = range(5, 96)
