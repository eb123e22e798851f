"""Finding stop strings in text that arrives in pieces.

Only what could still be the beginning of a stop string is held back.

Running example: stop strings ("\\n\\n", "END")
    add("one E")  -> ("one ", None)     "E" may begin "END"
    add("at\\n")   -> ("Eat", None)      it did not; "\\n" may begin "\\n\\n"
    add("\\nmore") -> ("", "\\n\\n")       found; "more" is never shown

The result does not depend on how the text is cut: the stop string that is complete first
counts, and of several that end at the same character the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Released(NamedTuple):
    text: str  # what may be shown now
    stop: str | None  # the stop string that ended the text, if one did


class StopStrings:
    """The held-back tail of one sequence's text. With `include_stop` the found string itself is shown."""

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string would stop at once"
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def add(self, text: str) -> Released:
        """What `text` lets go. After a stop string has been found nothing may be added."""
        if not self._stops:
            return Released(text, None)
        text = self._held + text
        found = self._first_complete(text)
        if found is not None:
            end, stop = found
            self._held = ""
            return Released(text[: end if self._include_stop else end - len(stop)], stop)
        keep = max(_beginning_at_end(text, stop) for stop in self._stops)
        split = len(text) - keep
        self._held = text[split:]
        return Released(text[:split], None)

    def flush(self) -> str:
        """The held tail, at the end of a text that no stop string ended."""
        held, self._held = self._held, ""
        return held

    def _first_complete(self, text: str) -> tuple[int, str] | None:
        ends = [(start + len(stop), -len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not ends:
            return None
        end, _, stop = min(ends)
        return end, stop


def _beginning_at_end(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
