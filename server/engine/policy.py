"""The decisions of a step as pure functions over arrays: how much, in which order, within which budget, who ends.

It holds no state and knows no pool. Running example (chunks of 4 tokens, budget of 8):

    starts  [9, 0, 3, 4]   lengths [10, 9, 4, 11]   ->   counts [1, 4, 1, 4]
    order by (prefill, arrival): decodes 0 and 2, then prefills 1 and 3; 1 + 1 + 4 fit, the last waits a step
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from server.engine.request import FinishReason
from server.engine.sequence import BoolArray, Int32Array, Int64Array, SequenceTable

Int8Array = npt.NDArray[np.int8]

NEAR_COST = 0.25  # a unit copied from the host's memory, in units read from disk (or blocks computed again)
COST_OF_ANY_LOAD_UNITS = 2.0  # opening, checking and binding, whatever the size

GOES_ON, BY_LENGTH, BY_EOS, BY_STOP_TOKEN = 0, 1, 2, 3  # codes of `endings`
REASONS = {BY_LENGTH: FinishReason.LENGTH, BY_EOS: FinishReason.EOS, BY_STOP_TOKEN: FinishReason.STOP_TOKEN}


def chunk_counts(starts: Int32Array, lengths: Int32Array, chunk_size: int) -> Int32Array:
    """Tokens to compute next: up to the next multiple of `chunk_size` of the sequence's own positions, or its end.

    Boundaries depend on nothing but the sequence, so its arithmetic does not depend on its company.
    """
    counts: Int32Array = np.minimum((starts // chunk_size + 1) * chunk_size, lengths) - starts
    return counts


def order_of_service(counts: Int32Array, arrivals: Int64Array) -> Int64Array:
    """Indices that put single tokens (decoding) first, then prefills, each by arrival."""
    return np.lexsort((arrivals, counts > 1))


def fit_budget(counts: Int32Array, budget: int, *, reserve: int = 0) -> Int64Array:
    """Indices of the ordered entries that run in this step: whole chunks, in order, at least one entry.

    Decodes come first. `reserve` tokens are kept from them for a prefill that they crowded out in the step before; the
    youngest of them then pause for this step.
    """
    num_decodes = int(np.count_nonzero(counts == 1))
    num_kept = min(num_decodes, max(0, budget - reserve)) if reserve else num_decodes
    candidates = np.concatenate((np.arange(num_kept), np.arange(num_decodes, len(counts))))
    num_fitting = int(np.searchsorted(counts[candidates].cumsum(), budget, side="right"))
    return candidates[: max(1, num_fitting)]


def blocks_for(num_tokens: Int32Array, block_size: int) -> Int32Array:
    """Blocks that hold so many tokens, rounded up."""
    return -(-num_tokens // block_size)


def endings(table: SequenceTable, rows: Int32Array, token_ids: Int32Array, is_eos: BoolArray) -> Int8Array:
    """How each row ends with its new token, already appended: int8 [n] of GOES_ON, BY_LENGTH, BY_EOS, BY_STOP_TOKEN.

    A token ends nothing before `min_length`; where several reasons hold, the token says more than the length.
    """
    lengths = table.length[rows]
    codes: Int8Array = np.where(lengths >= table.max_length[rows], BY_LENGTH, GOES_ON).astype(np.int8)
    may_end = lengths >= table.min_length[rows]
    stops = (table.stop_ids[rows] == token_ids[:, None]).any(axis=1) & may_end
    codes[stops] = BY_STOP_TOKEN
    codes[is_eos[token_ids] & table.ends_at_eos[rows] & may_end] = BY_EOS
    return codes


class WorthOf(Protocol):
    """The eviction policy: what keeping an idle adapter is worth, in the units that it would cost to bring it back.

    The pool divides it by the steps since the adapter was last used, and gives up what is worth least a unit.
    """

    def __call__(self, num_units: int, uses: float, *, is_near: bool) -> float:
        """`uses`: how often it was used, old uses counting less; `is_near`: the host's memory holds a copy."""


def worth_by_use(num_units: int, uses: float, *, is_near: bool) -> float:
    """What is used often and is dear to reload stays longer: a read from disk costs more than a copy, and a small
    adapter's load costs more a unit than a large one's, because of what every load costs."""
    return max(1.0, uses) * (num_units * (NEAR_COST if is_near else 1.0) + COST_OF_ANY_LOAD_UNITS)


def worth_by_age(num_units: int, uses: float, *, is_near: bool) -> float:
    """Least recently used: only the time since the last use counts."""
    return float(num_units)


EVICTION_POLICIES: dict[str, WorthOf] = {"weighed": worth_by_use, "lru": worth_by_age}


def cheapest_window(loss: Int64Array, blocked: BoolArray, extra: Int64Array, count: int) -> int | None:
    """Highest start of the window of `count` units with the least loss (plus `extra` by start), none of it blocked."""
    window = _window_sums(loss, count) + extra
    window[_window_sums(blocked.astype(np.int64), count) > 0] = np.iinfo(np.int64).max
    best = len(window) - 1 - int(window[::-1].argmin())
    return None if window[best] == np.iinfo(np.int64).max else best


def _window_sums(values: Int64Array, count: int) -> Int64Array:
    sums: Int64Array = np.concatenate((np.zeros(1, np.int64), values.cumsum()))
    return sums[count:] - sums[:-count]
