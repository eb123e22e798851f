"""A promotion gate: golden prompts that a version must answer as expected before an alias may move to it.

    gate = Gate((GoldenPrompt("2+2=", contains=("4",)),))
    verdict = await gate.judge("math@7", answer)          answer: whoever can generate text
    verdict.passed, verdict.results[0].reason

Prompts are answered greedily, so a verdict is the same each time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adapters_store.errors import StoreDamaged

MAX_PROMPTS = 64
_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """What is asked and what the answer must be like; without an expectation it must only be answered."""

    inputs: str
    max_new_tokens: int = 32
    equals: str | None = None  # the whole answer
    contains: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    def fault(self, answer: str) -> str | None:
        """What is wrong with an answer; None if nothing is."""
        if self.equals is not None and answer != self.equals:
            return f"the answer is {_short(answer)}, expected {_short(self.equals)}"
        missing = next((text for text in self.contains if text not in answer), None)
        if missing is not None:
            return f"the answer {_short(answer)} does not contain {_short(missing)}"
        found = next((text for text in self.lacks if text in answer), None)
        return None if found is None else f"the answer {_short(answer)} contains {_short(found)}"


Answer = Callable[[str, GoldenPrompt], Awaitable[str]]  # (reference, prompt) -> text; raises when it cannot


@dataclass(frozen=True, slots=True)
class GoldenResult:
    inputs: str
    answer: str | None
    reason: str | None  # why it failed; None if it passed


@dataclass(frozen=True, slots=True)
class Verdict:
    reference: str
    passed: bool
    results: tuple[GoldenResult, ...]

    def __str__(self) -> str:
        failed = [result for result in self.results if result.reason is not None]
        if not failed:
            return f"{self.reference} passed {len(self.results)} golden prompts"
        first = f"{_short(failed[0].inputs)}: {failed[0].reason}"
        return f"{self.reference} failed {len(failed)} of {len(self.results)} golden prompts. {first}"


@dataclass(frozen=True, slots=True)
class Gate:
    prompts: tuple[GoldenPrompt, ...]
    min_passed: int | None = None  # None: all

    async def judge(self, reference: str, answer: Answer) -> Verdict:
        """Asks every prompt, one after the other. Whatever stops an answer counts as a failed prompt."""
        results = []
        for prompt in self.prompts:
            try:
                text = await answer(reference, prompt)
            except Exception as error:  # the version's, the engine's or the text's fault: it did not answer
                results.append(GoldenResult(prompt.inputs, None, f"no answer: {error}"))
            else:
                results.append(GoldenResult(prompt.inputs, text, prompt.fault(text)))
        num_passed = sum(result.reason is None for result in results)
        needed = len(self.prompts) if self.min_passed is None else self.min_passed
        return Verdict(reference, num_passed >= needed, tuple(results))

    def to_json(self) -> dict[str, Any]:
        return {"prompts": [asdict(prompt) for prompt in self.prompts], "min_passed": self.min_passed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Gate:
        """Raises StoreDamaged if `data` is not what `to_json` writes."""
        try:
            prompts = [
                GoldenPrompt(**{**item, "contains": tuple(item["contains"]), "lacks": tuple(item["lacks"])})
                for item in data["prompts"]
            ]
            return cls(tuple(prompts), data["min_passed"])
        except (KeyError, TypeError) as error:
            raise StoreDamaged(f"a promotion gate's rule lacks or mistypes {error}.") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")
