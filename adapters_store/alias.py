"""What an alias means: one version, or several by weight, and what it meant before.

    Alias({3: 90, 4: 10})       nine of ten callers get version 3
    alias.choose("user-7")      always the same one of the two for the same key
    alias.history[0].weights    what a rollback brings back

Shifting weight moves only those keys that must move: a key is a point on a line that the versions, in the order of
their numbers, share by weight.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters_store.errors import InvalidWeights, StoreDamaged

MAX_WEIGHT = 10_000
MAX_TARGETS = 8
MAX_HISTORY = 16  # earlier meanings that are remembered

Weights = Mapping[int, int]  # version -> share, relative to the sum


@dataclass(frozen=True, slots=True)
class AliasMove:
    """What an alias meant until it was moved away."""

    weights: Weights
    until: str  # RFC 3339, UTC

    def to_json(self) -> dict[str, Any]:
        return {"weights": weights_to_json(self.weights), "until": self.until}


@dataclass(frozen=True, slots=True)
class Alias:
    weights: Weights  # at least one version, every share above 0
    history: tuple[AliasMove, ...] = ()  # newest first

    @property
    def main(self) -> int:
        """The version with the largest share; of equal shares the older version."""
        return min(self.weights, key=lambda version: (-self.weights[version], version))

    def choose(self, key: str | None, salt: str = "") -> int:
        """The version for a caller: by `key` the same each time, without one by chance.

        `salt` (the adapter's name) lets the same callers not be the canaries of every adapter.
        """
        if len(self.weights) == 1:
            return next(iter(self.weights))
        total = sum(self.weights.values())
        point = random.randrange(total) if key is None else _point(f"{salt}\0{key}", total)
        for version in sorted(self.weights):
            point -= self.weights[version]
            if point < 0:
                return version
        raise AssertionError("the shares do not add up to their sum")

    def moved(self, weights: Weights, now: str) -> Alias:
        """The alias with another meaning, and its present one remembered."""
        return Alias(dict(weights), (AliasMove(self.weights, now), *self.history)[:MAX_HISTORY])

    def without(self, versions: Iterable[int]) -> Alias | None:
        """The alias once these versions are gone: the others share what they had. None if nothing is left."""
        gone = set(versions)
        left = {version: share for version, share in self.weights.items() if version not in gone}
        return Alias(left, self.history) if left else None

    def to_json(self) -> dict[str, Any]:
        return {"weights": weights_to_json(self.weights), "history": [move.to_json() for move in self.history]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Alias:
        """Raises StoreDamaged if `data` is not what `to_json` writes."""
        try:
            history = tuple(AliasMove(_weights(move["weights"]), move["until"]) for move in data["history"])
            return cls(_weights(data["weights"]), history)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreDamaged(f"an alias's record lacks or mistypes {error}.") from error


def check_weights(weights: Weights) -> Weights:
    """The weights themselves. Raises InvalidWeights saying which rule they break."""
    shares = weights.values()
    is_right = all(type(share) is int and 0 < share <= MAX_WEIGHT for share in shares)
    if not weights or len(weights) > MAX_TARGETS or not is_right:
        raise InvalidWeights(
            f"an alias points to 1 to {MAX_TARGETS} versions, each with a whole share of 1 to {MAX_WEIGHT}; "
            f"{dict(weights)} does not. Leave a version out to give it nothing."
        )
    return weights


def weights_to_json(weights: Weights) -> dict[str, int]:
    """As it is written in JSON, whose keys are strings."""
    return {str(version): weights[version] for version in sorted(weights)}


def _weights(data: Mapping[str, int]) -> Weights:
    weights = {int(version): int(share) for version, share in data.items()}
    if not weights:
        raise ValueError("weights")
    return weights


def _point(text: str, total: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") * total >> 64
