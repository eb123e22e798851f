"""Whether an adapter does anything at all: one that was saved untrained adds zeros, and its owner wants to know."""

from __future__ import annotations

import torch

from peft_core.forms import AdapterForms, Bottleneck, EmbeddingChange, SiteChange

CHANGES_NOTHING = (
    "this adapter changes nothing: every number that it adds is zero, and every number that it multiplies with is one. "
    "It was probably saved before training."
)


def changes_nothing(forms: AdapterForms) -> bool:
    """Whether the base with these forms is the base, as far as the numbers alone say it.

    Whatever replaces something of the base counts as a change, equal or not.
    """
    low_rank = [(delta.up, delta.down) for path, delta in forms.linear.items() if path not in forms.bottlenecks]
    if forms.prefix is not None or forms.virtual is not None or forms.head_rows or forms.norms:
        return False
    if any(_is_product(up, down) for up, down in low_rank):
        return False
    if any(bool(delta.up.any()) and bool(delta.down.any()) for delta in forms.experts.values()):
        return False
    if any(_is_change(change) for change in forms.changes.values()):
        return False
    if any(_is_embedding_change(change) for change in forms.embeddings.values()):
        return False
    return not any(_adds(forms, path, block) for path, block in forms.bottlenecks.items())


def _is_product(up: torch.Tensor | None, down: torch.Tensor | None) -> bool:
    """Whether `up @ down` has a part of its rank that is not zero."""
    if up is None or down is None:
        return False
    return bool((up.any(dim=0) & down.any(dim=1)).any())


def _is_change(change: SiteChange) -> bool:
    if change.replacement is not None:
        return True
    adds = (change.shift, change.dense, change.sin)
    if any(part is not None and bool(part.any()) for part in adds):
        return True
    if any(part is not None and bool((part != 1).any()) for part in (change.gain, change.input_gain, change.cos)):
        return True
    if change.rotation is not None:
        return bool((change.rotation != torch.eye(change.rotation.shape[-1])).any())
    left, right = change.kron_left, change.kron_right
    return left is not None and right is not None and bool(left.any()) and bool(right.any())


def _is_embedding_change(change: EmbeddingChange) -> bool:
    if change.replacement is not None or change.token_ids:
        return True
    return _is_product(change.up, change.down) or (change.gain is not None and bool((change.gain != 1).any()))


def _adds(forms: AdapterForms, path: str, block: Bottleneck) -> bool:
    """Whether a bottleneck adds anything. What its layer norm makes of the block's output counts as something."""
    if block.residual or block.norm_out_weight is not None:
        return True
    delta = forms.linear.get(path)
    return (delta is not None and bool(delta.up.any())) or (block.up_bias is not None and bool(block.up_bias.any()))
