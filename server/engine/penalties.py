"""Which tokens a sequence has seen, and what that costs them.

    repetition   over prompt and generated tokens: a positive logit is divided by it, a negative one multiplied
                 (Keskar et al., "CTRL"; as transformers and vLLM)
    frequency    over generated tokens: minus penalty times how often
    presence     over generated tokens: minus penalty, once
                 (both as in OpenAI's API reference; after the repetition penalty, as vLLM)

The tokens of a row are kept as a list of distinct ids with counts, not as counts over the vocabulary: a step reads and
writes as many logits as the sequence has distinct tokens. Rows without penalties own nothing here.

Running example: prompt [5, 7, 5], then generated 7, 9
    ids       [5, 7, 9]
    generated [0, 1, 1]
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.request import SamplingParams
from server.engine.sequence import Int32Array, SequenceTable


class Penalties:
    """Distinct tokens of the rows that asked for penalties, kept up to date from the sequence table."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self._max_distinct = max_model_len
        self._places = np.full(max_num_seqs, -1, dtype=np.int64)  # row -> place in the arrays below, -1 is none
        self._free: list[int] = []
        self._ids = np.zeros((0, self._max_distinct), dtype=np.int64)  # distinct tokens, in order of appearance
        self._generated = np.zeros((0, self._max_distinct), dtype=np.float32)  # how often generated
        self._num_distinct = np.zeros(0, dtype=np.int64)
        self._known = np.zeros(0, dtype=np.int64)  # tokens of the sequence counted so far
        self._vocab_size = np.zeros(0, dtype=np.int64)  # ids beyond are not counted
        self._strengths = np.zeros((0, 3), dtype=np.float32)  # repetition, frequency, presence

    def join(
        self, row: int, params: SamplingParams, prompt: Int32Array, generated: Int32Array, *, vocab_size: int
    ) -> None:
        """Starts counting for a row; `generated` is not empty when a preempted sequence comes back."""
        if not self._free:
            self._grow()
        place = self._free.pop()
        self._places[row] = place
        self._strengths[place] = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        seen = np.concatenate([prompt, generated]).astype(np.int64)
        is_generated = np.arange(len(seen)) >= len(prompt)
        in_vocab = (seen >= 0) & (seen < vocab_size)
        ids, inverse = np.unique(seen[in_vocab], return_inverse=True)
        self._ids[place, : len(ids)] = ids
        self._generated[place, : len(ids)] = np.bincount(inverse, is_generated[in_vocab], minlength=len(ids))
        self._num_distinct[place] = len(ids)
        self._known[place] = len(seen)
        self._vocab_size[place] = vocab_size

    def forget(self, row: int) -> None:
        place = int(self._places[row])
        if place >= 0:
            self._places[row] = -1
            self._free.append(place)

    def apply_(self, logits: torch.Tensor, rows: Int32Array, table: SequenceTable) -> None:
        """Changes the logits of the rows that have penalties, in place.

        Shapes:
            logits [n, vocab] float32; rows [n], of the sequence table
        """
        places = self._places[rows]
        mine = np.flatnonzero(places >= 0)
        places = places[mine]
        if not mine.size:
            return
        self._catch_up(places, rows[mine], table)
        occupied = self._num_distinct[places] > 0
        mine, places = mine[occupied], places[occupied]
        if mine.size:
            _penalise_(logits, mine, *self._padded(places), self._strengths[places])

    def _catch_up(self, places: NDArray[np.int64], rows: Int32Array, table: SequenceTable) -> None:
        """Counts what was appended since the last time: one token a row in the steady state."""
        while True:
            behind = np.flatnonzero(self._known[places] < table.length[rows])
            if not behind.size:
                return
            places, rows = places[behind], rows[behind]
            self._count(places, table.tokens[rows, self._known[places]].astype(np.int64))
            self._known[places] += 1

    def _count(self, places: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        in_vocab = (tokens >= 0) & (tokens < self._vocab_size[places])
        places, tokens = places[in_vocab], tokens[in_vocab]
        widths = self._num_distinct[places]
        columns = np.arange(max(1, int(widths.max(initial=0))))
        matches = (self._ids[places[:, None], columns] == tokens[:, None]) & (columns < widths[:, None])
        is_known = matches.any(axis=1)
        columns = np.where(is_known, matches.argmax(axis=1), widths)
        fresh = places[~is_known]
        self._ids[fresh, columns[~is_known]] = tokens[~is_known]
        self._generated[fresh, columns[~is_known]] = 0.0
        self._num_distinct[fresh] += 1
        self._generated[places, columns] += 1.0

    def _padded(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and counts as matrices; past its end a row repeats its first token, which is then written twice alike."""
        widths = self._num_distinct[places]
        columns = np.arange(int(widths.max()))
        columns = np.where(columns < widths[:, None], columns, 0)
        return self._ids[places[:, None], columns], self._generated[places[:, None], columns]

    def _grow(self) -> None:
        old = len(self._known)
        more = max(8, old)
        self._free.extend(range(old + more - 1, old - 1, -1))
        for name in ("_ids", "_generated", "_num_distinct", "_known", "_vocab_size", "_strengths"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros((more, *array.shape[1:]), dtype=array.dtype)]))


def _penalise_(
    logits: torch.Tensor,
    rows: NDArray[np.intp],
    ids: NDArray[np.int64],
    generated: NDArray[np.float32],
    strengths: NDArray[np.float32],
) -> None:
    """Shapes: ids and generated [n, distinct], strengths [n, 3]; `rows` [n] are rows of the logits."""
    device = logits.device
    row_index = torch.from_numpy(rows).to(device).unsqueeze(-1)
    id_index = torch.from_numpy(ids).to(device)
    counts = torch.from_numpy(generated).to(device)
    repetition, frequency, presence = torch.from_numpy(strengths).to(device).unsqueeze(-1).unbind(1)
    values = logits[row_index, id_index]
    values = torch.where(values < 0, values * repetition, values / repetition)
    logits[row_index, id_index] = values - frequency * counts - presence * (counts > 0)
