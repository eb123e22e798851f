"""The two tables of a base's vocabulary, and adapters that bring tables of another size.

The input embedding and the head are two modules even where they share one weight (tied): an adapter may change either
alone. A table of the adapter with more rows than the base's makes the vocabulary larger for that adapter. One with
fewer rows (tables are often padded) is padded again, and the logits beyond its end are pushed out of reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_core.spec import BaseModelSpec, Site

UNREACHABLE = -3e4  # a logit that is never drawn, and that every float dtype can hold


@dataclass(frozen=True, slots=True)
class Vocabulary:
    embedding: Site | None  # that reads the prompt
    head: Site | None
    is_tied: bool  # both are one weight

    @classmethod
    def of(cls, spec: BaseModelSpec) -> Vocabulary:
        head = next((site for site in spec.sites.values() if site.kind == "head"), None)
        embeddings = [site for site in spec.sites.values() if site.kind == "embedding"]
        is_tied = spec.tie_word_embeddings and head is not None
        num_rows = head.out_features if is_tied and head is not None else spec.vocab_size
        fitting = [site for site in embeddings if site.in_features == num_rows]
        return cls(next(iter(fitting or embeddings), None), head, is_tied)

    def twin(self, path: str) -> str | None:
        """The other module of a tied weight."""
        if not self.is_tied or self.embedding is None or self.head is None:
            return None
        pair = {self.embedding.path: self.head.path, self.head.path: self.embedding.path}
        return pair.get(path)

    def size(self, path: str) -> int | None:
        """Rows of a table in the base; None for a module that is no table of the vocabulary."""
        if self.embedding is not None and path == self.embedding.path:
            return self.embedding.in_features
        if self.head is not None and path == self.head.path:
            return self.head.out_features
        return None


def padded(table: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A table with at least so many rows, the new ones zero.  # [rows, width]"""
    missing = num_rows - table.shape[0]
    return table if missing <= 0 else torch.cat([table, table.new_zeros(missing, table.shape[1])])


def unreachable(num_rows: int, num_base_rows: int) -> torch.Tensor | None:
    """What is added to the logits of a head whose own table is shorter than the base's, if it is.  # [num_base_rows]"""
    if num_rows >= num_base_rows:
        return None
    shift = torch.zeros(num_base_rows)
    shift[num_rows:] = UNREACHABLE
    return shift
