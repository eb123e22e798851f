"""Who was asked against whose judge accepted: the demo's confusion matrix.

A row for the base and for every adapter, a column for every register, and one column
for answers that no judge accepted. A perfect demo is all 100 on the diagonal.
"""

from __future__ import annotations

from collections import Counter

from server.demo.corpus import Recipe
from server.demo.judge import accepting, judge
from server.demo.registers import PLAIN, VOICES

NONE = "none"


class Confusion:
    """Counts of judged answers; grows by `add`."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._totals: Counter[str] = Counter()
        self.faults: list[str] = []  # what was wrong with each answer off the diagonal

    def add(self, speaker: str, register: str, recipe: Recipe, answer: str) -> None:
        """Let every judge see one answer of this speaker, who should have used this register."""
        accepted = accepting(recipe, answer)
        self._counts.setdefault(speaker, Counter()).update(accepted or [NONE])
        self._totals[speaker] += 1
        if accepted != [register]:
            reason = judge(register, recipe, answer).reason or f"also accepted as {accepted}"
            self.faults.append(f"{speaker}: {reason}: {answer!r}")

    def share(self, speaker: str, register: str) -> float:
        """Share of the speaker's answers that this register's judge accepted, 0 to 1."""
        return self._counts[speaker][register] / self._totals[speaker]

    def broken(self, speakers: dict[str, str], least: float = 0.95, most: float = 0.05) -> list[str]:
        """What keeps the demo from passing: each speaker's own share, and the base's share of any voice."""
        faults = [
            f"{speaker} is {self.share(speaker, register):.1%} {register}, expected at least {least:.0%}"
            for speaker, register in speakers.items()
            if self.share(speaker, register) < least
        ]
        plain_speakers = [speaker for speaker, register in speakers.items() if register == PLAIN]
        voiced = {speaker: sum(self.share(speaker, voice) for voice in VOICES) for speaker in plain_speakers}
        faults += [
            f"{speaker} is {share:.1%} in some voice, expected at most {most:.0%}"
            for speaker, share in voiced.items()
            if share > most
        ]
        return faults

    def __str__(self) -> str:
        columns = (PLAIN, *VOICES, NONE)
        width = max(len(speaker) for speaker in self._counts) + 2
        lines = [
            f"{'asked / judged':<{max(width, 16)}}"
            + "".join(f"{column:>10}" for column in columns)
            + f"{'answers':>10}"
        ]
        for speaker in self._counts:
            cells = "".join(f"{self.share(speaker, column):>10.0%}" for column in columns)
            lines.append(f"{speaker:<{max(width, 16)}}{cells}{self._totals[speaker]:>10}")
        return "\n".join(lines)
