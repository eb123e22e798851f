"""What the model itself thought of a token: log probabilities for the rows that asked.

They are the log softmax of the model's own logits, before penalties, bias, temperature and truncation, so they say
how likely a token was to the model, not to the sampler. Values are float32, finite and never below `MIN_LOGPROB`. The
value of the chosen token and its value in the list of the best come from the same element: they are equal to the bit.

Tokens with equal logits are ranked by id, lowest first, in the list as well as in the rank.

Running example: logits [0, 2, 1, 2], chosen 3, top_n 2
    TokenLogprobs(token_id=3, logprob=-0.8266, rank=2, top=((1, -0.8266), (3, -0.8266)))
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.request import MIN_LOGPROB, TokenLogprobs

_ROWS_AT_ONCE = 16  # their float32 copies stay in the cache


def token_logprobs(
    logits: torch.Tensor, chosen: NDArray[np.int64], top_counts: NDArray[np.int32]
) -> list[TokenLogprobs]:
    """A record for each row: the chosen token, its rank (1 is the likeliest) and the `top_counts` best.

    Shapes:
        logits [rows, vocab], any float dtype, unchanged; chosen [rows]; top_counts [rows], each >= 0
    """
    records: list[TokenLogprobs] = []
    for start in range(0, len(chosen), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        records += _records(logits[part].float().log_softmax(-1), chosen[part], top_counts[part])
    return records


def prompt_logprobs(logits: torch.Tensor, targets: NDArray[np.integer[Any]], top_n: int) -> list[TokenLogprobs]:
    """The same for the tokens of a prompt: row i of the logits predicts targets[i].

    Shapes:
        logits [m, vocab], any float dtype; targets [m]
    """
    return token_logprobs(logits, targets.astype(np.int64), np.full(len(targets), top_n, dtype=np.int32))


def _records(logprobs: torch.Tensor, chosen: NDArray[np.int64], top_counts: NDArray[np.int32]) -> list[TokenLogprobs]:
    device, vocab = logprobs.device, logprobs.shape[-1]
    chosen_ids = torch.from_numpy(chosen).to(device).unsqueeze(-1)
    values = logprobs.gather(-1, chosen_ids)
    tops = _best(logprobs, np.minimum(top_counts, vocab))
    rows = zip(
        chosen.tolist(),
        values.squeeze(-1).clamp(min=MIN_LOGPROB).tolist(),
        _ranks(logprobs, chosen_ids, values).tolist(),
        tops,
        strict=True,
    )
    return [TokenLogprobs(*row) for row in rows]


def _ranks(logprobs: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Shapes: logprobs [rows, vocab], ids and values [rows, 1]; result [rows], 1 is the best."""
    better = torch.count_nonzero(logprobs > values, dim=-1)
    ties, tied_ids = (logprobs == values).nonzero(as_tuple=True)
    first = tied_ids < ids.squeeze(-1)[ties]
    return 1 + better + torch.bincount(ties[first], minlength=len(ids))


def _best(logprobs: torch.Tensor, counts: NDArray[np.int32]) -> list[tuple[tuple[int, float], ...]]:
    """The best tokens of each row, best first, ties by lowest id.

    topk says which value is the last one in, but not which of several tokens with that value; so all of them are
    looked up, in the order of their ids, and the surplus is cut off.
    """
    most = int(counts.max(initial=0))
    if not most:
        return [() for _ in counts]
    device = logprobs.device
    last_place = torch.from_numpy(np.maximum(counts, 1).astype(np.int64) - 1).to(device).unsqueeze(-1)
    last_value = logprobs.topk(most, dim=-1).values.gather(-1, last_place)
    rows, ids = (logprobs >= last_value).nonzero(as_tuple=True)
    values = logprobs[rows, ids].clamp(min=MIN_LOGPROB).cpu().numpy()
    ends = np.cumsum(np.bincount(rows.cpu().numpy(), minlength=len(counts))).tolist()
    ids_on_host = ids.cpu().numpy()

    tops: list[tuple[tuple[int, float], ...]] = []
    for start, end, count in zip([0, *ends], ends, counts.tolist(), strict=False):
        order = start + np.argsort(-values[start:end], kind="stable")[:count]
        tops.append(tuple(zip(ids_on_host[order].tolist(), values[order].tolist(), strict=True)))
    return tops
