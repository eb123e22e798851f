"""Changes to single logits that a request asked for, before anything is chosen.

The order is that of transformers' and vLLM's processors: bias, then the penalties (so that a bias is penalised like
any other logit), then the tokens that may not come yet. Greedy rows choose from the result too.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.penalties import Penalties
from server.engine.request import SamplingParams
from server.engine.sequence import Int32Array, SequenceTable


class LogitEdits:
    """Bias, penalties and minimum lengths of the rows that have any."""

    def __init__(self, max_num_seqs: int, max_model_len: int, eos_token_ids: tuple[int, ...] = ()) -> None:
        self._eos_token_ids = eos_token_ids
        self._penalties = Penalties(max_num_seqs, max_model_len)
        self._biases: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}  # row -> ids, values
        self._endings: dict[int, tuple[int, NDArray[np.int64]]] = {}  # row -> min_new_tokens, ids that would end it

    def join(
        self, row: int, params: SamplingParams, prompt: Int32Array, generated: Int32Array, *, vocab_size: int
    ) -> bool:
        """Keeps what the row needs. Returns whether it needs anything at all.

        Raises:
            ValueError: the logit bias names a token outside the vocabulary.
        """
        if params.logit_bias:
            self._biases[row] = _bias(params, vocab_size)
        if params.min_new_tokens > 0:
            ids = np.array(sorted({*self._eos_token_ids, *params.stop_token_ids}), dtype=np.int64)
            self._endings[row] = params.min_new_tokens, ids[(ids >= 0) & (ids < vocab_size)]
        if _has_penalties(params):
            self._penalties.join(row, params, prompt, generated, vocab_size=vocab_size)
        return bool(params.logit_bias) or params.min_new_tokens > 0 or _has_penalties(params)

    def forget(self, row: int) -> None:
        self._biases.pop(row, None)
        self._endings.pop(row, None)
        self._penalties.forget(row)

    def apply_(self, logits: torch.Tensor, rows: Int32Array, table: SequenceTable) -> None:
        """Edits the logits in place.

        Shapes:
            logits [n, vocab] float32; rows [n], of the sequence table
        """
        self._add_biases_(logits, rows)
        self._penalties.apply_(logits, rows, table)
        self._forbid_endings_(logits, rows, table.length[rows] - table.prompt_length[rows])

    def _add_biases_(self, logits: torch.Tensor, rows: Int32Array) -> None:
        if not self._biases:
            return
        picked = [(index, *self._biases[row]) for index, row in enumerate(rows.tolist()) if row in self._biases]
        if picked:
            index = torch.from_numpy(np.concatenate([np.full(len(ids), index) for index, ids, _ in picked]))
            ids = torch.from_numpy(np.concatenate([ids for _, ids, _ in picked]))
            values = torch.from_numpy(np.concatenate([values for _, _, values in picked]))
            place = index.to(logits.device), ids.to(logits.device)
            logits.index_put_(place, values.to(logits.device), accumulate=True)

    def _forbid_endings_(self, logits: torch.Tensor, rows: Int32Array, num_generated: Int32Array) -> None:
        if not self._endings:
            return
        for index, (row, generated) in enumerate(zip(rows.tolist(), num_generated.tolist(), strict=True)):
            least, ids = self._endings.get(row, (0, None))
            if ids is not None and generated < least:
                logits[index].index_fill_(0, torch.from_numpy(ids).to(logits.device), -torch.inf)


def _bias(params: SamplingParams, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    ids = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"logit_bias names token {outside[0]}, but the vocabulary has the tokens 0 to {vocab_size - 1}. Remove it."
        )
    return ids, np.array([value for _, value in params.logit_bias], dtype=np.float32)


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
