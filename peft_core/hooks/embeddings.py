"""Embedding tables with changes, and virtual tokens: rows that stand before a prompt.

Semantics: `peft_core.forms.EmbeddingChange` and `VirtualTokens`. A token id from `VIRTUAL_TOKEN_BASE` on is a row of
the adapter's virtual tokens; an id beyond the base's table belongs to an adapter with a larger vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding

from peft_core.batch import SlotRows
from peft_core.forms import AdapterForms, EmbeddingChange, VirtualTokens
from peft_core.kernels.invariance import invariant_product
from peft_core.kernels.vectors import row_index
from peft_core.traits import VIRTUAL_TOKEN_BASE


class _Change:
    """One adapter's change, and the rows that it acts on."""

    def __init__(self, place: slice | torch.Tensor, change: EmbeddingChange, device: torch.device) -> None:
        self.place, self.change = place, change
        self.token_ids = torch.tensor(change.token_ids, dtype=torch.int64, device=device)


class EmbeddingHooks:
    """The two hooks of one embedding module: before it, ids that it does not know; after it, the changed rows."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        parts: Sequence[SlotRows],
        forms: Mapping[int, AdapterForms],
        *,
        has_virtual: bool,
    ) -> None:
        """`has_virtual`: it embeds the tokens, and there are virtual ones among those of the step."""
        self.table: torch.Tensor = module.get_parameter("weight")
        self.scale: Any = getattr(module, "embed_scale", 1.0)
        device = self.table.device
        self._changes = [
            _Change(row_index(part.rows, device), forms[part.slot].embeddings[path], device)
            for part in parts
            if path in forms[part.slot].embeddings
        ]
        self._virtual = [
            (row_index(part.rows, device), forms[part.slot].virtual)
            for part in parts
            if has_virtual and (forms[part.slot].virtual is not None or forms[part.slot].prefix is not None)
        ]
        self._ids: torch.Tensor | None = None

    def before(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        self._ids = args[0].reshape(-1)
        return (args[0].masked_fill(args[0] >= len(self.table), 0), *args[1:])

    def after(self, _module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        assert self._ids is not None
        ids, self._ids = self._ids, None
        rows = output.view(len(ids), -1)
        for change in self._changes:
            own = ids[change.place]
            known = own.masked_fill(own >= VIRTUAL_TOKEN_BASE, 0)
            rows[change.place] = (self.scale * _changed_rows(known, self.table, change)).to(rows.dtype)
        for place, virtual in self._virtual:
            own, result = ids[place] - VIRTUAL_TOKEN_BASE, rows[place]
            is_virtual = own >= 0
            if bool(is_virtual.any()):
                result[is_virtual] = _virtual_rows(virtual, own[is_virtual], result)
                rows[place] = result
        return output


def _changed_rows(ids: torch.Tensor, table: torch.Tensor, one: _Change) -> torch.Tensor:
    """[n, width] in the wider dtype, before the module's scale. ids: [n]."""
    change = one.change
    source = table if change.replacement is None else change.replacement
    rows = embedding(ids.clamp(max=len(source) - 1), source)
    if change.down is not None and change.up is not None:
        rows = rows.to(torch.promote_types(rows.dtype, change.up.dtype))
    if change.rows is not None:
        hits = ids[:, None] == one.token_ids
        found = hits.any(1)
        rows = torch.where(found[:, None], change.rows[hits.int().argmax(1)].to(rows.dtype), rows)
    if change.down is not None and change.up is not None:
        columns = change.down.index_select(1, ids.clamp(max=change.down.shape[1] - 1)).T
        rows = rows + invariant_product(columns.contiguous(), change.up)
    return rows if change.gain is None else rows * change.gain


def _virtual_rows(virtual: VirtualTokens | None, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a prefix, whose keys and values come from the image, anything finite will do."""
    if virtual is None:
        return like.new_zeros(len(indices), like.shape[1])
    return virtual.rows.flatten(0, 1).index_select(0, indices).to(like.dtype)
