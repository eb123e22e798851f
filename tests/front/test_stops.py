"""Stop strings are found wherever the text is cut, and nothing is held back without need."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.front.stops import StopStrings

few_letters = st.text("abn\n", max_size=12)
stop_sets = st.lists(st.text("abn\n", min_size=1, max_size=4), min_size=1, max_size=4)


def reference(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def fed(pieces: list[str], stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    finder = StopStrings(stops, include_stop)
    shown = ""
    for piece in pieces:
        released = finder.add(piece)
        shown += released.text
        if released.stop is not None:
            return shown, released.stop
    return shown + finder.flush(), None


@given(few_letters, stop_sets, st.lists(st.integers(0, 12), max_size=5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_result_does_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int], include_stop: bool
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    assert fed(pieces, stops, include_stop) == reference(text, stops, include_stop)


@given(few_letters, stop_sets)
@settings(max_examples=200, deadline=None)
def test_only_a_possible_beginning_is_held_back(text: str, stops: list[str]) -> None:
    finder = StopStrings(stops)
    released = finder.add(text)
    if released.stop is not None:
        return
    held = text[len(released.text) :]
    beginnings = [stop[:length] for stop in stops for length in range(len(stop))]
    assert held == max((beginning for beginning in beginnings if text.endswith(beginning)), key=len)


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStrings(()).add("abc") == ("abc", None)


def test_the_running_example() -> None:
    finder = StopStrings(("\n\n", "END"))
    assert finder.add("one E") == ("one ", None)
    assert finder.add("at\n") == ("Eat", None)
    assert finder.add("\nmore") == ("", "\n\n")


def test_an_empty_stop_string_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="at once"):
        StopStrings(("",))
