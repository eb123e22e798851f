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
from server.engine.top_values import top_values

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
        _ranks(logprobs, chosen_ids, values),
        tops,
        strict=True,
    )
    return [TokenLogprobs(*row) for row in rows]


def _ranks(logprobs: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> list[int]:
    """Shapes: logprobs [rows, vocab], ids and values [rows, 1]; 1 is the best."""
    if logprobs.device.type == "cpu":  # numpy counts booleans ten times as fast as torch
        rows = zip(logprobs.numpy(), ids.squeeze(-1).tolist(), values.squeeze(-1).numpy(), strict=True)
        return [_rank(row, token_id, value) for row, token_id, value in rows]
    better = torch.count_nonzero(logprobs > values, dim=-1)
    ties, tied_ids = (logprobs == values).nonzero(as_tuple=True)
    first = tied_ids < ids.squeeze(-1)[ties]
    ranks: list[int] = (1 + better + torch.bincount(ties[first], minlength=len(ids))).tolist()
    return ranks


def _rank(row: NDArray[np.float32], token_id: int, value: np.float32) -> int:
    at_least = int(np.count_nonzero(row >= value))
    if at_least == 1:
        return 1
    return at_least - int(np.count_nonzero(row[token_id + 1 :] == value))


def _best(logprobs: torch.Tensor, counts: NDArray[np.int32]) -> list[tuple[tuple[int, float], ...]]:
    """The best tokens of each row, best first, ties by lowest id.

    topk says which value is the last one in, but not which of several tokens with that value; so all of them are
    looked up, in the order of their ids, and the surplus is cut off.
    """
    most = int(counts.max(initial=0))
    if not most:
        return [() for _ in counts]
    last_place = torch.from_numpy(np.maximum(counts, 1).astype(np.int64) - 1).to(logprobs.device).unsqueeze(-1)
    rows, ids, values = _at_least(logprobs, top_values(logprobs, most).gather(-1, last_place))
    ends = np.cumsum(np.bincount(rows, minlength=len(counts))).tolist()

    tops: list[tuple[tuple[int, float], ...]] = []
    for start, end, count in zip([0, *ends], ends, counts.tolist(), strict=False):
        order = start + np.argsort(-values[start:end], kind="stable")[:count]
        tops.append(tuple(zip(ids[order].tolist(), values[order].tolist(), strict=True)))
    return tops


def _at_least(
    logprobs: torch.Tensor, limits: torch.Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Row, id and clamped value of every token that reaches its row's limit, by row, then by id.

    Shapes: logprobs [rows, vocab], limits [rows, 1]; results [tokens]
    """
    reached = logprobs >= limits
    if logprobs.device.type == "cpu":  # numpy finds them 25 times as fast as torch
        rows, ids = np.divmod(np.flatnonzero(reached.numpy()), logprobs.shape[-1])
        values = logprobs.numpy()[rows, ids]
    else:
        places = reached.nonzero(as_tuple=True)
        rows, ids = (place.cpu().numpy() for place in places)
        values = logprobs[places].cpu().numpy()
    return rows, ids, np.maximum(values, np.float32(MIN_LOGPROB))
