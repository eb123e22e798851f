"""Readers of streams: threads that keep asking and note when every token arrives.

They are the running streams that a hot swap must not disturb: each reads one answer after
another, and the gaps between its tokens are what a person would feel.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from server.demo import ADAPTER_REGISTERS
from server.demo.corpus import questions
from server.demo.judge import judge
from server.demo.registers import PLAIN
from server.demo.visitor import Visitor

MAX_NEW_TOKENS = 160


class Gap(NamedTuple):
    at_s: float  # time.monotonic() of the later token
    gap_ms: float


class Pace(NamedTuple):
    """What the gaps of one span of time were like, in milliseconds."""

    num_gaps: int
    median_ms: float
    p95_ms: float
    worst_ms: float


class Readers:
    """Some threads reading streams from entering to leaving; `None` among the speakers is the base."""

    def __init__(self, visitor: Visitor, speakers: Sequence[str | None]) -> None:
        self._visitor = visitor
        self._threads = [
            threading.Thread(target=self._read, args=(speaker, seed), daemon=True)
            for seed, speaker in enumerate(speakers)
        ]
        self._leaving = threading.Event()
        self._gaps: list[Gap] = []
        self._errors: list[Exception] = []
        self.num_answers = 0
        self.num_right = 0

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()
        if self._errors and error is None:
            raise self._errors[0]

    def pace(self, start_s: float, end_s: float) -> Pace:
        """The gaps that ended between two readings of time.monotonic(). Raises ValueError if there were none."""
        gaps = sorted(gap.gap_ms for gap in list(self._gaps) if start_s <= gap.at_s < end_s)
        if not gaps:
            raise ValueError(f"no stream got two tokens in {end_s - start_s:.1f} s; is the server overloaded?")
        return Pace(len(gaps), gaps[len(gaps) // 2], gaps[int(len(gaps) * 0.95)], gaps[-1])

    def _read(self, speaker: str | None, seed: int) -> None:
        try:
            for number in itertools.count():
                if self._leaving.is_set():
                    return
                self._read_answer(speaker, seed * 1_000_000 + number)
        except Exception as error:  # handed to the one who leaves
            self._errors.append(error)

    def _read_answer(self, speaker: str | None, seed: int) -> None:
        (question,) = questions(seed, 1)
        answer, last_s = "", None
        for token in self._visitor.stream(question.prompt, speaker, max_new_tokens=MAX_NEW_TOKENS):
            now_s = time.monotonic()
            if last_s is not None:
                self._gaps.append(Gap(now_s, (now_s - last_s) * 1000))
            last_s, answer = now_s, token.generated_text or answer
        register = PLAIN if speaker is None else ADAPTER_REGISTERS[speaker]
        self.num_answers += 1
        self.num_right += judge(register, question.recipe, answer).accepted
