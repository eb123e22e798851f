"""One token per row, drawn from weights with a number that belongs to the sequence alone.

The uniform number of a draw is a hash of (seed, how many tokens the sequence has generated), nothing else: no
generator object, no state. So the company of a row, its place in the batch, chunking, preemption and a restarted
engine cannot change what it draws.

The hash is the SplitMix64 stream (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
whose starting state is the mixed seed, addressed directly:

    state    = mix(seed)
    number k = mix(state + (k + 1) * 0x9E3779B97F4A7C15) >> 11, times 2**-53

The draw is the inverse of the cumulative distribution, in the order of the token ids, found in two levels: sums of
bins of 128 weights first, then the weights of the one bin that the number falls into. No sort, one pass.

Running example: weights [1, 2, 1], uniform 0.5: the cumulative sums are [1, 3, 4], the target 2, the token 1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

BIN = 128
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: NDArray[np.uint64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 bits for each (seed, step).

    Shapes:
        seeds [rows] uint64, steps [rows] int64 (tokens generated so far); result [rows] float64
    """
    mixed = _mix(_mix(seeds) + (steps.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def draw(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Token ids drawn with probability softmax(scores).

    Semantics:
        the smallest id with  sum(exp(scores[: id + 1])) > number * sum(exp(scores))

    Shapes:
        scores [rows, vocab] float32, the largest of each row is 0 and removed tokens are -inf;
        numbers [rows] float64 in [0, 1); result [rows] int64, never a removed token
    """
    weights = _in_bins(scores.exp())
    sums = weights.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    targets = _below(numbers * ends[:, -1], ends[:, -1])
    bins = torch.searchsorted(ends, targets.unsqueeze(-1), right=True)
    starts = (ends - sums).gather(-1, bins).squeeze(-1)

    rows = torch.arange(len(scores), device=scores.device)
    inner_ends = weights[rows, bins.squeeze(-1)].cumsum(-1, dtype=torch.float64)
    inner_targets = _below((targets - starts).clamp_(min=0.0), inner_ends[:, -1])
    inner = torch.searchsorted(inner_ends, inner_targets.unsqueeze(-1), right=True)
    return (bins * BIN + inner).squeeze(-1)


def _in_bins(weights: torch.Tensor) -> torch.Tensor:
    num_rows, vocab = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -vocab % BIN))
    return padded.view(num_rows, -1, BIN)


def _below(values: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Values kept strictly below their limits: rounding may not lead past the last token that has weight."""
    return torch.minimum(values, torch.nextafter(limits, torch.zeros_like(limits)))
