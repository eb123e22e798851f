"""Which tokens may be drawn at all: top-k, top-p, min-p and typical-p.

Order and meaning are those of the logits warpers of transformers, each on what the ones before it left:
temperature (already applied), top-k, top-p, min-p, typical-p.

Each of the first three keeps the tokens whose score reaches a floor, so only a floor is looked for and nothing is
scattered back. Tokens of equal score stay or go together: with bfloat16 logits ties are common, and which of two
equal tokens survives must not depend on a sort.

Running example, one row with probabilities [0.5, 0.3, 0.1, 0.1]:
    top_k=2    floor log(0.3 / 0.5), keeps 0, 1
    top_p=0.7  0.5 is less than 0.7, 0.5 + 0.3 is not: keeps 0, 1
    min_p=0.5  floor log(0.5): keeps 0, 1
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.top_values import top_values

NUMS_CANDIDATES = (128, 1024)  # how many of the best scores are looked at; a row that needs more is sorted wholly


class Limits(NamedTuple):
    """What each row allows; all arrays are [rows]."""

    top_k: NDArray[np.int32]  # 0 is off
    top_p: NDArray[np.float64]  # 1.0 is off
    min_p: NDArray[np.float64]  # 0.0 is off
    typical_p: NDArray[np.float64]  # 1.0 is off

    def pick(self, rows: NDArray[np.intp]) -> Limits:
        return Limits(self.top_k[rows], self.top_p[rows], self.min_p[rows], self.typical_p[rows])


def truncate_(scores: torch.Tensor, limits: Limits) -> None:
    """Sets the scores of tokens that may not be drawn to -inf, in place.

    Shapes:
        scores [rows, vocab] float32, temperature applied, the largest of each row is 0
    """
    floors = np.full(len(scores), -np.inf, dtype=np.float32)
    ranked = np.flatnonzero((limits.top_k > 0) | (limits.top_p < 1.0))
    if ranked.size:
        floors[ranked] = _ranked_floors(_rows(scores, ranked), limits.pick(ranked))
    smallest = np.flatnonzero(limits.min_p > 0.0)
    floors[smallest] = np.maximum(floors[smallest], np.log(limits.min_p[smallest]).astype(np.float32))
    if ranked.size or smallest.size:
        scores.masked_fill_(scores < torch.from_numpy(floors).to(scores.device).unsqueeze(-1), -torch.inf)

    typical = np.flatnonzero(limits.typical_p < 1.0)
    if typical.size:
        index = torch.from_numpy(typical).to(scores.device)
        scores[index] = _typical(scores[index], limits.typical_p[typical])


def _rows(scores: torch.Tensor, rows: NDArray[np.intp]) -> torch.Tensor:
    return scores if len(rows) == len(scores) else scores[torch.from_numpy(rows).to(scores.device)]


def _ranked_floors(scores: torch.Tensor, limits: Limits) -> NDArray[np.float32]:
    """The floors of top-k and top-p, looked for among ever more of the best scores."""
    vocab = scores.shape[-1]
    floors = np.empty(len(scores), dtype=np.float32)
    missing = np.arange(len(scores))
    for num_candidates in (*NUMS_CANDIDATES, vocab):
        rest, allowed = _rows(scores, missing), limits.pick(missing)
        best = top_values(rest, num_candidates) if num_candidates < vocab else _sorted_descending(rest)
        floors[missing], is_certain = _floors_among(best, rest, allowed)
        missing = missing[~is_certain]
        if not missing.size:
            break
    return floors


def _sorted_descending(scores: torch.Tensor) -> torch.Tensor:
    if scores.device.type != "cpu":
        return scores.sort(dim=-1, descending=True).values
    # numpy sorts a row of 32,000 floats about four times as fast as torch does
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)[:, ::-1].copy())


def _floors_among(
    best: torch.Tensor, scores: torch.Tensor, limits: Limits
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Floors, and whether each is certain although only the `best` scores were looked at.

    Shapes:
        best [rows, candidates] descending, the head of each sorted row of scores [rows, vocab]; results [rows]
    """
    device = scores.device
    num_candidates, vocab = best.shape[-1], scores.shape[-1]
    has_k = (limits.top_k > 0) & (limits.top_k < vocab)
    has_p = limits.top_p < 1.0

    kth = torch.from_numpy(np.clip(limits.top_k, 1, num_candidates).astype(np.int64) - 1).to(device)
    k_floors = best.gather(-1, kth.unsqueeze(-1))
    k_floors.masked_fill_(torch.from_numpy(~has_k).to(device).unsqueeze(-1), -torch.inf)
    k_is_exact = ~has_k | (limits.top_k <= num_candidates)
    if not has_p.any():
        return k_floors.squeeze(-1).cpu().numpy(), k_is_exact

    # As in transformers, the mass of top-p is a share of what top-k left.
    mass = scores.exp().masked_fill_(scores < k_floors, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    weights = best.exp().to(torch.float64)
    mass_before = weights.cumsum(-1) - weights
    share = torch.from_numpy(np.where(has_p, limits.top_p, np.inf)).to(device).unsqueeze(-1)
    kept = ((mass_before < share * mass) & (best >= k_floors)).sum(-1, keepdim=True).clamp_(min=1)
    floors = torch.where(torch.from_numpy(has_p).to(device).unsqueeze(-1), best.gather(-1, kept - 1), k_floors)
    p_is_exact = ~has_p | has_k | (kept.squeeze(-1).cpu().numpy() < num_candidates) | (num_candidates == vocab)
    return floors.squeeze(-1).cpu().numpy(), k_is_exact & p_is_exact


def _typical(scores: torch.Tensor, typical_p: NDArray[np.float64]) -> torch.Tensor:
    """Keeps the tokens whose surprise is nearest to the expected one (Meister et al., "Locally typical sampling")."""
    logprobs = scores.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)
    distance = (-logprobs - entropy).abs_()
    ordered, index = distance.sort(dim=-1, stable=True)
    mass = logprobs.gather(-1, index).exp().cumsum(-1, dtype=torch.float64)
    share = torch.from_numpy(typical_p).to(scores.device).unsqueeze(-1)
    last = (mass < share).sum(-1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
    return scores.masked_fill(distance > ordered.gather(-1, last), -torch.inf)
