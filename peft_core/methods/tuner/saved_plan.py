"""What becomes of the parameters of the base that an adapter replaces.

    a linear, the head      SiteChange.replacement; a bias becomes the difference, SiteChange.shift
    the embedding           EmbeddingChange.replacement, or .rows
    rows of the head        HeadRows
    a norm                  NormWeights

A weight that equals the base's changes nothing and is dropped: PEFT stores whole tables beside an adapter on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from peft_core.forms import AdapterForms, EmbeddingChange, HeadRows, NormWeights, SiteChange
from peft_core.methods.base_weights import BaseWeights, require_base
from peft_core.methods.report import FormName
from peft_core.methods.tensors import TensorSource, read_finite
from peft_core.methods.tuner.token_rows import StoredRows
from peft_core.methods.tuner.vocabulary import Vocabulary, padded, unreachable
from peft_core.spec import BaseModelSpec


class StoredWeight(NamedTuple):
    name: str  # of the tensor
    is_copy: bool  # of a module that is adapted as well: untrained, mostly the base's own


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """All decisions about the replaced parameters; `read` only turns tensors into forms."""

    spec: BaseModelSpec
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)  # by module path
    biases: Mapping[str, str] = field(default_factory=dict)  # path -> tensor name
    rows: tuple[StoredRows, ...] = ()
    vocabulary: int | None = None  # rows of the adapter's tables, where they are not as many as the base's
    grown: tuple[str, ...] = ()  # tables that are the base's, made longer by new tokens whose rows are all there
    num_parameters: int = 0  # trained
    warnings: tuple[str, ...] = ()

    @property
    def forms(self) -> tuple[FormName, ...]:
        found: list[FormName] = []
        for path, stored in self.weights.items():
            if stored.is_copy and self.vocabulary is None:
                continue  # the base's own, most likely
            site = self.spec.sites.get(path)
            found.append("norm" if site is None else "embedding" if site.kind == "embedding" else "replacement")
        for path in self.grown:
            found.append("embedding" if self.spec.sites[path].kind == "embedding" else "replacement")
        for path in self.biases:
            found.append("shift" if path in self.spec.sites else "norm")
        for row in self.rows:
            found.append("embedding" if self.spec.sites[row.path].kind == "embedding" else "head rows")
        return tuple(dict.fromkeys(found))

    @property
    def needs_base(self) -> bool:
        """A replaced bias cannot be read without the base's; a copied weight not be told from it."""
        has_copies = any(stored.is_copy for stored in self.weights.values())
        return has_copies or bool(self.grown) or any(path in self.spec.sites for path in self.biases)

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """Replacements, shifts, norms, embeddings and rows; float32 on the host.

        Raises:
            MalformedAdapter: a tensor holds NaN or infinity, or is not what the header announced.
            UnsupportedAdapter: a bias is replaced, and the base's weights are not at hand.
        """
        changes: dict[str, SiteChange] = {}
        embeddings: dict[str, EmbeddingChange] = {}
        norms: dict[str, dict[str, torch.Tensor]] = {}
        for path, weight in self._changed_weights(tensors, base).items():
            site = self.spec.sites.get(path)
            if site is None:
                norms.setdefault(path, {})["weight"] = weight
            elif site.kind == "embedding":
                embeddings[path] = EmbeddingChange(replacement=padded(weight, site.in_features))
            else:
                table = padded(weight, site.out_features) if site.kind == "head" else weight
                changes[path] = SiteChange(replacement=table, shift=unreachable(weight.shape[0], site.out_features))
        for path, name in self.biases.items():
            if path in self.spec.norms:
                norms.setdefault(path, {})["bias"] = read_finite(tensors, name)
            else:
                old = changes.get(path, SiteChange())
                changes[path] = SiteChange(replacement=old.replacement, shift=self._shift(path, name, tensors, base))
        head_rows = self._put_rows(embeddings, changes, tensors)
        return AdapterForms(
            changes=changes,
            embeddings=embeddings,
            head_rows=head_rows,
            norms={path: NormWeights(**parameters) for path, parameters in norms.items()},
            vocab_size=self.larger_vocabulary,
        )

    @property
    def larger_vocabulary(self) -> int | None:
        head = Vocabulary.of(self.spec).head
        is_larger = self.vocabulary is not None and head is not None and self.vocabulary > head.out_features
        return self.vocabulary if is_larger else None

    def base_seen(self, tensors: TensorSource, base: BaseWeights | None) -> BaseWeights | None:
        """The base as the adapter's own modules see it: with the copies that its file brings along."""
        copies = {path: stored.name for path, stored in self.weights.items() if stored.is_copy}
        return _CopiedBase(base, copies, tensors, self.spec) if base is not None and copies else base

    def _changed_weights(self, tensors: TensorSource, base: BaseWeights | None) -> dict[str, torch.Tensor]:
        """Weights by path, logical [out, in] of linears, without those that equal the base's."""
        read: dict[str, torch.Tensor] = {}
        changed: dict[str, torch.Tensor] = {}
        for path, stored in self.weights.items():
            if stored.name not in read:
                read[stored.name] = read_finite(tensors, stored.name)
            site = self.spec.sites.get(path)
            weight = read[stored.name]
            weight = weight.T.contiguous() if site is not None and site.transposed else weight
            if base is None or not _is_same(weight, base.weight(path), stored, tensors):
                changed[path] = weight
        for path in self.grown:
            own = require_base(base, "A larger vocabulary of which only the new rows are stored").weight(path)
            changed[path] = padded(own, self.vocabulary or 0)
        return changed

    def _shift(self, path: str, name: str, tensors: TensorSource, base: BaseWeights | None) -> torch.Tensor:
        own = require_base(base, f'The replaced bias "{name}"').bias(path)
        stored = read_finite(tensors, name)
        return stored if own is None else stored - own

    def _put_rows(
        self, embeddings: dict[str, EmbeddingChange], changes: dict[str, SiteChange], tensors: TensorSource
    ) -> dict[str, HeadRows]:
        """Put rows of tokens where they belong: into a table that is replaced anyway, or beside the base's."""
        head_rows: dict[str, HeadRows] = {}
        read = {name: read_finite(tensors, name) for name in {row.name for row in self.rows}}
        for path, name, token_ids in self.rows:
            is_head, rows = self.spec.sites[path].kind == "head", read[name]
            change = changes.get(path) if is_head else embeddings.get(path)
            if change is not None and change.replacement is not None:
                table = change.replacement.clone()  # it may be that of another module as well
                table[list(token_ids)] = rows
                if isinstance(change, SiteChange):
                    changes[path] = replace(change, replacement=table)
                else:
                    embeddings[path] = replace(change, replacement=table)
            elif is_head:
                head_rows[path] = HeadRows(token_ids, rows)
            else:
                embeddings[path] = EmbeddingChange(token_ids=token_ids, rows=rows)
        return head_rows


class _CopiedBase:
    """Weights of the base, except those that the file copies."""

    def __init__(
        self, base: BaseWeights, copies: Mapping[str, str], tensors: TensorSource, spec: BaseModelSpec
    ) -> None:
        self._base, self._copies, self._tensors, self._spec = base, copies, tensors, spec

    def weight(self, path: str) -> torch.Tensor:
        if path not in self._copies:
            return self._base.weight(path)
        weight, site = read_finite(self._tensors, self._copies[path]), self._spec.sites.get(path)
        return weight.T.contiguous() if site is not None and site.transposed else weight

    def bias(self, path: str) -> torch.Tensor | None:
        return self._base.bias(path)


def _is_same(weight: torch.Tensor, own: torch.Tensor, stored: StoredWeight, tensors: TensorSource) -> bool:
    """Whether a weight is the base's; a copy may have been rounded to the dtype of the file."""
    if weight.shape != own.shape:
        return False
    if torch.equal(weight, own):
        return True
    rounded = {"BF16": torch.bfloat16, "F16": torch.float16}.get(tensors.header[stored.name].dtype)
    return stored.is_copy and rounded is not None and torch.equal(weight, own.to(rounded).to(torch.float32))
