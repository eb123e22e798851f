"""Where virtual tokens stand, at which positions, and from where an adapter acts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.traits import PLAIN_TRAITS, VIRTUAL_TOKEN_BASE, AdapterTraits
from server.engine import block_hash
from server.engine.sequence import BASE_KEY, Sequence
from server.engine.token_layout import NEVER, TokenLayout, layout_of
from tests.engine.simulated import ask, ticket


def test_a_plain_adapter_changes_nothing() -> None:
    layout = layout_of(PLAIN_TRAITS, (1, 2), None)
    assert layout == TokenLayout()
    assert layout.tokens((1, 2)).tolist() == [1, 2]


def test_virtual_tokens_stand_before_the_prompt_one_set_a_task() -> None:
    traits = AdapterTraits(num_virtual_tokens=3, first_position=3, num_tasks=2)
    first, second = (layout_of(traits, (7, 9), task).tokens((7, 9)).tolist() for task in (0, 1))
    assert first == [VIRTUAL_TOKEN_BASE, VIRTUAL_TOKEN_BASE + 1, VIRTUAL_TOKEN_BASE + 2, 7, 9]
    assert second == [VIRTUAL_TOKEN_BASE + 3, VIRTUAL_TOKEN_BASE + 4, VIRTUAL_TOKEN_BASE + 5, 7, 9]


@pytest.mark.parametrize(("first_position", "offset"), [(3, 0), (0, 3)])
def test_positions_of_a_prefix_count_or_do_not(first_position: int, offset: int) -> None:
    layout = layout_of(AdapterTraits(3, first_position, has_prefix=True), (7,), None)
    assert (layout.prefix_length, layout.position_offset) == (3, offset)


@pytest.mark.parametrize(
    ("prompt", "active_from"),
    [
        ((5, 6), 0),
        ((1, 5, 6, 2, 5, 6, 3), 4),  # the last one
        ((1, 5, 6, 5), 1),  # half of one does not count
        ((6, 5), NEVER),
        ((5,), NEVER),  # shorter than the invocation
        ((), NEVER),
    ],
)
def test_an_invocation_begins_at_its_last_occurrence(prompt: tuple[int, ...], active_from: int) -> None:
    assert layout_of(AdapterTraits(invocation_tokens=(5, 6)), prompt, None).active_from == active_from


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_an_invocation_is_found_wherever_it_stands(prompt: list[int], wanted: list[int]) -> None:
    places = [i for i in range(len(prompt)) if prompt[i : i + len(wanted)] == wanted]
    layout = layout_of(AdapterTraits(invocation_tokens=tuple(wanted)), tuple(prompt), None)
    assert layout.active_from == (places[-1] if places else NEVER)


def test_without_its_invocation_a_sequence_is_the_bases() -> None:
    adapter = ticket("a", invocation_tokens=(9,))
    assert Sequence(ask("x", [1, 2], adapter), 1, max_length=9).key == BASE_KEY
    assert Sequence(ask("x", [1, 9], adapter), 1, max_length=9).key == adapter.key


def _names(
    prompt: list[int], name: str | None = None, *, generated: tuple[int, ...] = (), salt: str = ""
) -> list[bytes]:
    adapter = None if name is None else ticket(name, invocation_tokens=(9, 8))
    sequence = Sequence(ask("x", prompt, adapter, salt=salt), 1, max_length=99)
    tokens = np.concatenate([sequence.tokens, np.array(generated, np.int32)])
    return list(block_hash.hashes_of(sequence, tokens, len(tokens) // 4, 4))


def test_blocks_before_the_invocation_bear_the_bases_names() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 0, 1, 9, 8, 2, 3, 4, 5, 6]  # the adapter begins in the third block of four
    base, one, other = _names(prompt), _names(prompt, "one"), _names(prompt, "other")
    assert base[:2] == one[:2] == other[:2]
    assert len({*base[2:], *one[2:], *other[2:]}) == 6
    assert _names(prompt, "one", salt="tenant")[0] != one[0]
    assert _names([*prompt[:8], *prompt[9:], 6], "one")[2] != one[2]  # it begins where a block does


def test_the_same_tokens_bear_another_name_where_the_adapter_begins_elsewhere() -> None:
    prompt = [1, 9, 8, 9, 8, 2, 3, 4]  # both begin in the first block of four
    early = _names(prompt[:3], "one", generated=tuple(prompt[3:]))  # what is generated invokes nothing
    late = _names(prompt, "one")
    assert early[0] != late[0]


def test_names_grow_across_the_invocation_as_if_asked_for_at_once() -> None:
    sequence = Sequence(
        ask("x", [1, 2, 3, 4, 9, 8, 7, 6, 5, 4, 3, 2], ticket("a", invocation_tokens=(8,))), 1, max_length=99
    )
    for count in (1, 2, 3):
        grown = list(block_hash.hashes_of(sequence, sequence.tokens, count, 4))
    assert grown == _again(sequence)


def _again(sequence: Sequence) -> list[bytes]:
    fresh = Sequence(sequence.request, 2, max_length=99)
    return list(block_hash.hashes_of(fresh, fresh.tokens, 3, 4))
