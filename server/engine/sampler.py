"""From the logits of a step to one token per sequence.

Knows the sampling parameters of the sequences that hold a row; does not know the model, the schedule or when a
sequence ends. Every row is treated in this order, which is that of transformers (and, but for the place of min-p,
of vLLM), so that transformers' processors are the oracle of the tests:

    bias -> repetition, frequency, presence penalty -> minimum length
         -> temperature -> top-k -> top-p -> min-p -> typical-p -> draw

Temperature 0 chooses the best logit after the first line; of equal ones the lowest id. Log probabilities are of the
logits before the first line (`server.engine.logprobs`).

The cost follows what is asked. One argmax serves the whole batch and finds broken logits on the way; a batch of plain
greedy rows does nothing else, and nothing per row in Python. The other rows are gathered and handled together.

A row whose adapter has a larger vocabulary than the base widens the logits of its step; each row then looks at its own
columns only, apart from the rows of other widths.

What a row gets depends on its own logits, parameters, seed and number of generated tokens, never on its company.

Running example: rows [4, 0, 9] of the table, where 0 has temperature 0.7 and 9 asked for log probabilities
    argmax        of all three
    gather, draw  row 0
    log softmax   row 9
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.draws import draw, uniforms
from server.engine.logit_edits import LogitEdits
from server.engine.logprobs import token_logprobs
from server.engine.request import SamplingParams, TokenLogprobs
from server.engine.sequence import Int32Array, SequenceTable
from server.engine.truncation import Limits, truncate_

_DRAWS, _IS_EDITED, _REPORTS = 1, 2, 4  # bits of "flags": has a temperature, has edits, asked for log probabilities

_ROW = np.dtype(
    [
        ("flags", np.uint8),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("typical_p", np.float64),
        ("seed", np.uint64),
        ("num_logprobs", np.int32),
        ("vocab_size", np.int64),
    ]
)

_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
_FLOATS_AT_ONCE = 1 << 20  # 4 MB of working logits: 32 rows of 32,000 tokens stay in the cache
_CAST_ROWS_AT_ONCE = 16  # of bfloat16 and float16

NOT_FINITE = "the model's logits are not finite (NaN or infinity); the adapter or the base produces broken numbers"
NOTHING_LEFT = "logit bias, penalties and minimum length leave no token that could come next, or overflow its logit"


class Sampled(NamedTuple):
    """The choice for each row, keyed by its index in the call, not by its row of the table."""

    token_ids: NDArray[np.int64]  # [n]; 0 where the row failed
    logprobs: dict[int, TokenLogprobs]  # only the rows that asked
    failed: dict[int, str]  # index -> reason


class Sampler:
    """Sampling parameters of the running sequences, one entry a row of the sequence table."""

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        max_model_len: int,
        device: torch.device,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._vocab_size = vocab_size
        self._rows = np.zeros(max_num_seqs, dtype=_ROW)
        self._rows["vocab_size"] = vocab_size
        self._edits = LogitEdits(max_num_seqs, max_model_len, eos_token_ids)
        self._slice_rows = max(1, _FLOATS_AT_ONCE // vocab_size) if device.type == "cpu" else max_num_seqs

    def join(
        self,
        row: int,
        params: SamplingParams,
        prompt_token_ids: Int32Array,
        generated: Int32Array,
        *,
        vocab_size: int | None = None,
    ) -> None:
        """A sequence got this row; `generated` is not empty when it comes back after a preemption.

        Args:
            vocab_size: of its adapter, where that is larger than the base's.

        Raises:
            ValueError: the logit bias names a token outside the vocabulary.
        """
        vocab_size = vocab_size or self._vocab_size
        is_edited = self._edits.join(row, params, prompt_token_ids, generated, vocab_size=vocab_size)
        entry = self._rows[row]
        entry["flags"] = (
            _DRAWS * (params.temperature > 0.0) | _IS_EDITED * is_edited | _REPORTS * (params.num_logprobs is not None)
        )
        entry["temperature"] = max(params.temperature, _LEAST_TEMPERATURE)  # below, only the best token has weight
        entry["top_k"] = min(max(0, params.top_k), vocab_size)
        entry["top_p"] = params.top_p
        entry["min_p"] = params.min_p
        entry["typical_p"] = params.typical_p
        entry["seed"] = params.seed & 0xFFFF_FFFF_FFFF_FFFF
        entry["num_logprobs"] = params.num_logprobs or 0
        entry["vocab_size"] = vocab_size

    def vocab_size_of(self, row: int) -> int:
        """Columns of the logits that are this row's."""
        return int(self._rows["vocab_size"][row])

    def forget(self, row: int) -> None:
        self._rows[row]["flags"] = 0
        self._edits.forget(row)

    def sample(self, logits: torch.Tensor, rows: Int32Array, table: SequenceTable) -> Sampled:
        """Chooses the next token of each row. Changes no logits; counts tokens for penalties as a side effect.

        Shapes:
            logits [n, vocab] float32, bfloat16 or float16, the widest vocabulary of the rows, what lies beyond a row's
            own is not looked at; rows [n], of the sequence table
        """
        if logits.shape[-1] == self._vocab_size:
            return self._sample(logits, rows, table)
        token_ids = np.empty(len(rows), np.int64)
        logprobs: dict[int, TokenLogprobs] = {}
        failed: dict[int, str] = {}
        widths = self._rows["vocab_size"][rows]
        for width in np.unique(widths).tolist():
            part = np.flatnonzero(widths == width)
            own = logits[torch.from_numpy(part).to(logits.device), :width]
            sampled = self._sample(own, rows[part], table)
            token_ids[part] = sampled.token_ids
            logprobs.update((int(part[index]), record) for index, record in sampled.logprobs.items())
            failed.update((int(part[index]), reason) for index, reason in sampled.failed.items())
        return Sampled(token_ids, logprobs, failed)

    def _sample(self, logits: torch.Tensor, rows: Int32Array, table: SequenceTable) -> Sampled:
        """As `sample`, for rows of one vocabulary."""
        best, token_ids = argmax(logits)
        failed: dict[int, str] = {}
        is_finite = np.isfinite(best)
        if not is_finite.all():
            failed = {int(index): NOT_FINITE for index in np.flatnonzero(~is_finite)}
            token_ids[~is_finite] = 0
        flags = self._rows["flags"][rows]
        if not flags.any():
            return Sampled(token_ids, {}, failed)

        flags[~is_finite] = 0
        special = np.flatnonzero(flags & (_DRAWS | _IS_EDITED))
        for start in range(0, len(special), self._slice_rows):
            part = special[start : start + self._slice_rows]
            token_ids[part], is_stuck = self._choose(_pick(logits, part), rows[part], table)
            failed.update((int(index), NOTHING_LEFT) for index in part[is_stuck])

        flags[list(failed)] = 0
        return Sampled(token_ids, self._report(logits, rows, token_ids, np.flatnonzero(flags & _REPORTS)), failed)

    def _choose(
        self, logits: torch.Tensor, rows: Int32Array, table: SequenceTable
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens of the rows that are edited or drawn, and which of them have no token left.

        Shapes:
            logits [n, vocab] float32, a copy that may be changed; results [n]
        """
        self._edits.apply_(logits, rows, table)
        best, token_ids = argmax(logits)
        is_stuck = ~np.isfinite(best)
        token_ids[is_stuck] = 0
        params = self._rows[rows]
        drawn = np.flatnonzero((params["flags"] & _DRAWS).astype(np.bool_) & ~is_stuck)
        if not drawn.size:
            return token_ids, is_stuck

        params, steps = params[drawn], (table.length[rows] - table.prompt_length[rows])[drawn]
        scores = logits if len(drawn) == len(rows) else logits[torch.from_numpy(drawn).to(logits.device)]
        scores.sub_(torch.from_numpy(best[drawn]).to(logits.device).unsqueeze(-1))
        scores.div_(torch.from_numpy(params["temperature"].copy()).to(logits.device).unsqueeze(-1))
        truncate_(scores, Limits(params["top_k"], params["top_p"], params["min_p"], params["typical_p"]))
        numbers = torch.from_numpy(uniforms(params["seed"], steps.astype(np.int64))).to(logits.device)
        token_ids[drawn] = draw(scores, numbers).cpu().numpy()
        return token_ids, is_stuck

    def _report(
        self,
        logits: torch.Tensor,
        rows: Int32Array,
        token_ids: NDArray[np.int64],
        reporting: NDArray[np.intp],
    ) -> dict[int, TokenLogprobs]:
        if not reporting.size:
            return {}
        counts = self._rows["num_logprobs"][rows[reporting]]
        own = logits if len(reporting) == len(rows) else _pick(logits, reporting)
        records = token_logprobs(own, token_ids[reporting], counts)
        return dict(zip(reporting.tolist(), records, strict=True))


def argmax(logits: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best logit of each row and its id, the lowest of equal ones.

    A NaN anywhere in a row, a positive infinity, or nothing but negative infinities make the value not finite.

    Shapes:
        logits [rows, vocab], any float dtype; results [rows]
    """
    if logits.device.type != "cpu":
        device_values, device_ids = logits.max(dim=-1)
        return device_values.float().cpu().numpy(), device_ids.cpu().numpy()
    # numpy's argmax is vectorised, torch's is not: 7 times as fast on [256, 32000] float32.
    rows_at_once = max(1, len(logits)) if logits.dtype == torch.float32 else _CAST_ROWS_AT_ONCE
    values = np.empty(len(logits), dtype=np.float32)
    ids = np.empty(len(logits), dtype=np.int64)
    for start in range(0, len(logits), rows_at_once):
        part = slice(start, start + rows_at_once)
        host = logits[part].float().numpy()
        ids[part] = host.argmax(axis=-1)
        values[part] = host[np.arange(len(host)), ids[part]]
    return values, ids


def _pick(logits: torch.Tensor, rows: NDArray[np.intp]) -> torch.Tensor:
    """A float32 copy of some rows."""
    return logits[torch.from_numpy(rows).to(logits.device)].float()
