"""A sampler with its table, and the oracle: transformers' own processors followed by an inverse distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.generation import logits_process as hf

from server.engine.draws import uniforms
from server.engine.request import SamplingParams
from server.engine.sampler import Sampled, Sampler
from server.engine.sequence import Int32Array, SequenceTable

EOS = 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """A sequence in the table: what it asked for and its tokens."""

    params: SamplingParams
    prompt: tuple[int, ...] = (5, 7, 5)
    generated: tuple[int, ...] = ()
    vocab: int | None = None  # of its adapter, where that is larger


def params(**values: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=1000, **values)


class Desk:
    """Rows joined to a sampler at chosen places of the table; `sample` takes logits in the order of the rows."""

    def __init__(self, rows: list[Row], vocab: int, places: list[int] | None = None, max_num_seqs: int = 64) -> None:
        self.table = SequenceTable(max_num_seqs, 128, 16)
        self.sampler = Sampler(max_num_seqs, vocab, 128, CPU, (EOS,))
        self.places: Int32Array = np.array(places if places is not None else range(len(rows)), dtype=np.int32)
        for place, row in zip(self.places.tolist(), rows, strict=True):
            self.join(place, row)

    def join(self, place: int, row: Row) -> None:
        tokens = [*row.prompt, *row.generated]
        self.table.tokens[place, : len(tokens)] = tokens
        self.table.length[place] = len(tokens)
        self.table.prompt_length[place] = len(row.prompt)
        prompt, generated = np.array(row.prompt, dtype=np.int32), np.array(row.generated, dtype=np.int32)
        self.sampler.join(place, row.params, prompt, generated, vocab_size=row.vocab)

    def sample(self, logits: torch.Tensor) -> Sampled:
        return self.sampler.sample(logits, self.places, self.table)

    def append(self, token_ids: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """What the engine does with the tokens of a step."""
        self.table.tokens[self.places, self.table.length[self.places]] = token_ids
        self.table.length[self.places] += 1


def oracle_scores(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """[vocab] float64: the scores that transformers' processors leave, in transformers' order.

    Frequency and presence penalties, which transformers lacks, are OpenAI's formula, after the repetition penalty.
    """
    asked, scores = row.params, logits.double()[None]
    tokens = torch.tensor([[*row.prompt, *row.generated]])
    if asked.logit_bias:
        scores = hf.SequenceBiasLogitsProcessor([[[token], value] for token, value in asked.logit_bias])(tokens, scores)
    if asked.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(asked.repetition_penalty)(tokens, scores)
    counts = torch.bincount(torch.tensor(row.generated, dtype=torch.int64), minlength=len(logits))
    scores = scores - asked.frequency_penalty * counts - asked.presence_penalty * (counts > 0)
    if asked.min_new_tokens:
        ends = [EOS, *asked.stop_token_ids]
        scores = hf.MinNewTokensLengthLogitsProcessor(len(row.prompt), asked.min_new_tokens, ends)(tokens, scores)
    for warper in _warpers(asked):
        scores = warper(tokens, scores)
    result: torch.Tensor = scores[0]
    return result


def _warpers(asked: SamplingParams) -> list[Any]:
    if asked.temperature == 0.0:
        return []
    warpers: list[Any] = [hf.TemperatureLogitsWarper(asked.temperature)]
    if asked.top_k:
        warpers.append(hf.TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1.0:
        warpers.append(hf.TopPLogitsWarper(asked.top_p))
    if asked.min_p:
        warpers.append(hf.MinPLogitsWarper(asked.min_p))
    if asked.typical_p < 1.0:
        warpers.append(hf.TypicalLogitsWarper(asked.typical_p))
    return warpers


def oracle_token(logits: torch.Tensor, row: Row) -> tuple[int, float]:
    """The token that the oracle chooses, and how far the uniform number was from choosing another."""
    scores = oracle_scores(logits, row)
    if row.params.temperature == 0.0:
        best = scores.topk(2).values
        return int(scores.argmax()), float(best[0] - best[1])
    ends = scores.softmax(-1).cumsum(-1)
    seeds = np.array([row.params.seed], dtype=np.uint64)
    number = float(uniforms(seeds, np.array([len(row.generated)]))[0])
    token = int(torch.searchsorted(ends, torch.tensor([number], dtype=torch.float64), right=True)[0])
    return token, float((ends - number).abs().min())
