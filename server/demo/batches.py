"""Documents as padded batches of token ids, with a weight for every token to be learned.

An answer's tokens weigh 1. A question's weigh little: it is drawn at random, so there is
little to learn from it but how one is worded. Padding weighs nothing and comes last, where
a causal model cannot see it, so no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from server.demo.corpus import Document

CONTEXT_WEIGHT = 0.1
_BATCHES_SORTED_TOGETHER = 16  # documents of similar length share a batch, so little is padded


class Batch(NamedTuple):
    token_ids: torch.Tensor  # [documents, longest] int64, padded at the end
    weights: torch.Tensor  # [documents, longest] float32: how much predicting this token counts


class _Encoded(NamedTuple):
    token_ids: list[int]
    num_context: int


def batches(
    documents: Iterator[Document], tokenizer: Tokenizer, size: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Endless batches of `size` documents in an order drawn from the generator."""
    while True:
        drawn = list(islice(documents, size * _BATCHES_SORTED_TOGETHER))
        encoded = sorted(_encode(drawn, tokenizer), key=lambda document: len(document.token_ids))
        for index in torch.randperm(_BATCHES_SORTED_TOGETHER, generator=generator).tolist():
            yield _pad(encoded[index * size : (index + 1) * size])


def encode_batch(documents: list[Document], tokenizer: Tokenizer) -> Batch:
    """These documents as one batch, in their order."""
    return _pad(_encode(documents, tokenizer))


def weighted_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the next token, weighted; logits are [documents, longest, vocabulary]."""
    targets, weights = batch.token_ids[:, 1:], batch.weights[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def _encode(documents: list[Document], tokenizer: Tokenizer) -> list[_Encoded]:
    contexts = tokenizer.encode_batch([document.context for document in documents])
    answers = tokenizer.encode_batch([document.answer for document in documents])
    return [
        _Encoded(context.ids + answer.ids, len(context.ids)) for context, answer in zip(contexts, answers, strict=True)
    ]


def _pad(documents: list[_Encoded]) -> Batch:
    longest = max(len(document.token_ids) for document in documents)
    token_ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    weights = torch.zeros(len(documents), longest)
    for row, document in enumerate(documents):
        length = len(document.token_ids)
        token_ids[row, :length] = torch.tensor(document.token_ids)
        weights[row, : document.num_context] = CONTEXT_WEIGHT
        weights[row, document.num_context : length] = 1.0
    return Batch(token_ids, weights)
