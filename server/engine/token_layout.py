"""How an adapter changes a request's row of tokens: what stands before the prompt, at which positions, and from where
the adapter acts.

A virtual token is a token: it has an id, takes part in chunks and blocks, is hashed, shared and preempted like any
other. Only what the caller sees (lengths of the prompt, cached tokens, log probabilities) counts real tokens.

Running example: 3 virtual tokens, task 1, prompt [7, 9]; B is `VIRTUAL_TOKEN_BASE`

    tokens     [B+3 B+4 B+5 | 7 9]
    positions  [ 0   1   2  | 3 4]     PEFT: the first real token stands at 3
    positions  [ 0   0   0  | 0 1]     first_position 0 (AdapterHub's prefixes; what the virtual ones get is of no use);
                                       the tokens before position_offset stay in sight of sliding windows
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from peft_core.traits import PLAIN_TRAITS, VIRTUAL_TOKEN_BASE, AdapterTraits

NEVER = int(np.iinfo(np.int32).max)  # `active_from` of an adapter whose invocation the prompt does not hold


class TokenLayout(NamedTuple):
    """All indices are into the sequence's tokens, the virtual ones included."""

    num_virtual: int = 0  # tokens before the prompt
    first_id: int = VIRTUAL_TOKEN_BASE  # of the virtual tokens; the others count up from it
    prefix_length: int = 0  # so many leading tokens have K/V of their own, which the adapter brings
    position_offset: int = 0  # the token at index i stands at position max(i - position_offset, 0)
    active_from: int = 0  # the adapter acts from this token on; `NEVER` if the invocation is absent

    def tokens(self, prompt: tuple[int, ...]) -> npt.NDArray[np.int32]:
        """The virtual tokens' ids, then the prompt."""
        tokens = np.empty(self.num_virtual + len(prompt), np.int32)
        tokens[: self.num_virtual] = np.arange(self.first_id, self.first_id + self.num_virtual)
        tokens[self.num_virtual :] = prompt
        return tokens


def layout_of(traits: AdapterTraits, prompt: tuple[int, ...], task_id: int | None) -> TokenLayout:
    """The layout of one request, decided once: what is generated later changes nothing about it."""
    if traits == PLAIN_TRAITS:
        return TokenLayout()
    count = traits.num_virtual_tokens
    return TokenLayout(
        num_virtual=count,
        first_id=VIRTUAL_TOKEN_BASE + (task_id or 0) * count,
        prefix_length=count if traits.has_prefix else 0,
        position_offset=count - traits.first_position,
        active_from=_active_from(traits, prompt),
    )


def _active_from(traits: AdapterTraits, prompt: tuple[int, ...]) -> int:
    """Start of the last occurrence of the invocation in the prompt."""
    wanted = traits.invocation_tokens
    if not wanted:
        return 0
    ids = np.asarray(prompt, np.int64)
    num_places = len(ids) - len(wanted) + 1
    if num_places < 1:
        return NEVER
    is_found = np.ones(num_places, np.bool_)
    for offset, token_id in enumerate(wanted):
        is_found &= ids[offset : offset + num_places] == token_id
    found = np.flatnonzero(is_found)
    return traits.num_virtual_tokens + int(found[-1]) if len(found) else NEVER
