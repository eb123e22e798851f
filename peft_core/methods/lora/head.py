"""LoRA at a head of which the adapter's file replaces more than the factors say.

a larger vocabulary    such a head has its own matrix anyway: the factors and the gain are multiplied into it
single rows            a row that replaces one of the base's gets the factors' share of it as well
"""

from __future__ import annotations

from dataclasses import replace

import torch

from peft_core.errors import UnsupportedAdapter
from peft_core.forms import AdapterForms, SiteChange
from peft_core.methods.lora.sites import LoraSite
from peft_core.methods.tuner.saved_plan import SavedPlan
from peft_core.spec import Site


def refuse_at_head(lora: LoraSite, saved: SavedPlan) -> None:
    """Raises UnsupportedAdapter for what only a head of the base's own size, or without replaced rows, can have."""
    path = lora.site.path
    if lora.site.kind != "head":
        return
    if saved.larger_vocabulary is not None and lora.bias is not None:
        raise UnsupportedAdapter(
            f'tensor "{lora.bias}" is a bias on the head of a larger vocabulary, which is not served. '
            "Train with lora_bias=False.",
            tensor=lora.bias,
        )
    if lora.magnitude is not None and any(row.path == path for row in saved.rows):
        raise UnsupportedAdapter(
            f'tensor "{lora.magnitude}" belongs to DoRA on "{path}", of which single rows are replaced as well: not '
            "served. Train with use_dora=False, or without trainable_token_indices.",
            tensor=lora.magnitude,
        )


def fold_head(forms: AdapterForms, head: Site | None) -> AdapterForms:
    """The same adapter, its head as said above."""
    if head is None or head.path not in forms.linear:
        return forms
    path, delta = head.path, forms.linear[head.path]
    if path in forms.head_rows:
        rows = forms.head_rows[path]
        share = delta.up[list(rows.token_ids)] @ delta.down
        forms = replace(forms, head_rows={**forms.head_rows, path: replace(rows, rows=rows.rows + share)})
    table = forms.changes[path].replacement if path in forms.changes else None
    if table is None or table.shape[0] <= head.out_features:
        return forms
    gain = forms.changes[path].gain
    folded = torch.addmm(table if gain is None else gain[:, None] * table, delta.up, delta.down)
    linear = {other: value for other, value in forms.linear.items() if other != path}
    return replace(forms, linear=linear, changes={**forms.changes, path: SiteChange(replacement=folded)})
