"""Prefix tuning (https://arxiv.org/abs/2101.00190) and cartridges (https://arxiv.org/abs/2506.06266).

    prompt_embeddings   [virtual tokens, layers * 2 * kv_heads * head_dim]

Keys and values of every layer, as attention reads them: rotated, normalised, everything done. Nothing is computed for
them but the sum over the prompt. A projection that training went through has been applied before saving.

    Semantics:
        [layer, keys or values] of x.view(tokens, layers, 2, kv_heads, head_dim)
        the prompt begins at position `tokens`

Running example: 20 tokens on a base of 3 layers with 2 key/value heads of 16: prompt_embeddings [20, 192]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_core.errors import UnsupportedAdapter
from peft_core.forms import AdapterForms, KVPrefix
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.prompt.prompt_learning import ROWS, PromptDraft, draft_prompt
from peft_core.methods.report import DecodeReport
from peft_core.methods.tensors import Header, TensorSource, read_finite
from peft_core.spec import BaseModelSpec

KIND = "PREFIX_TUNING"
CARTRIDGE_KIND = "CARTRIDGE"

IRRELEVANT_FIELDS: Mapping[str, str] = {
    "encoder_hidden_size": "sizes a projection that was applied before saving",
    "init_weights": "only steers an initialisation",
    "prefix_projection": "the projection was applied before saving",
}
CARTRIDGE_IRRELEVANT_FIELDS: Mapping[str, str] = {
    "num_frozen_tokens": "which tokens training left alone; they are stored like the others",
}


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """All decisions about one adapter, made without reading a tensor."""

    report: DecodeReport
    draft: PromptDraft

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """Cut the rows into keys and values.

        Raises:
            MalformedAdapter: a tensor holds NaN or infinity, or is not what the header announced.
        """
        spec, rows = self.draft.spec, read_finite(tensors, ROWS)
        parts = rows.view(len(rows), spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
        keys, values = (parts[:, :, which].transpose(0, 1).contiguous() for which in (0, 1))
        forms = AdapterForms(prefix=KVPrefix(keys, values, first_position=len(rows)))
        return self.draft.with_saved(forms, tensors, base)


def plan_prefix_tuning(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> PrefixPlan:
    """Decide everything about a prefix from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    return _plan(draft_prompt(KIND, config, header, spec, irrelevant=IRRELEVANT_FIELDS))


def plan_cartridge(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> PrefixPlan:
    """As `plan_prefix_tuning`: a cartridge is a prefix that was trained from a text's own keys and values."""
    return _plan(draft_prompt(CARTRIDGE_KIND, config, header, spec, irrelevant=CARTRIDGE_IRRELEVANT_FIELDS))


def _plan(draft: PromptDraft) -> PrefixPlan:
    spec = draft.spec
    if not spec.num_kv_heads:
        raise UnsupportedAdapter(
            f"{draft.kind} brings keys and values, and it is not known what those of this base look like."
        )
    draft.require_field("num_layers", spec.num_layers)
    draft.require_field("num_attention_heads", spec.num_kv_heads)  # PEFT means the key/value heads
    draft.require_field("token_dim", spec.num_kv_heads * spec.head_dim)
    width = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim
    draft.require(ROWS, (draft.num_tokens(), width), "the keys and values of all layers")
    return PrefixPlan(draft.report("prefix"), draft)
