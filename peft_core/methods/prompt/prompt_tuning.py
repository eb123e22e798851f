"""Trained input embeddings before the prompt: prompt tuning (https://arxiv.org/abs/2104.08691), P-tuning
(https://arxiv.org/abs/2103.10385), CPT (https://arxiv.org/abs/2410.17222) and multitask prompt tuning
(https://arxiv.org/abs/2303.02861).

    prompt_embeddings   [virtual tokens, hidden_size]
    prefix_task_cols    [tasks, virtual tokens, rank]      multitask prompt tuning only
    prefix_task_rows    [tasks, rank, hidden_size]

    Semantics:
        row i is what the first layer reads at position i; the prompt begins at position `virtual tokens`
        of task t:  prompt_embeddings * (prefix_task_cols[t] @ prefix_task_rows[t])

What P-tuning's encoder makes, and CPT's sum of tokens and differences, is stored evaluated.

The rows bypass the embedding module, so they miss a scale that the module applies itself. For Gemma and Gemma 2 that
is so since transformers 5; adapters trained with an older one need the factor sqrt(hidden_size). Nothing in the file
tells, so whoever knows says it: {"veneer_prompt_embed_scale": "sqrt_d"} in adapter_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_core.errors import MalformedAdapter
from peft_core.forms import AdapterForms, VirtualTokens
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.ledger import refuse
from peft_core.methods.prompt.prompt_learning import ROWS, PromptDraft, draft_prompt
from peft_core.methods.report import DecodeReport
from peft_core.methods.tensors import Header, TensorSource, read_finite, require_finite
from peft_core.methods.tuner.vocabulary import Vocabulary
from peft_core.spec import BaseModelSpec

KIND = "PROMPT_TUNING"
P_TUNING_KIND = "P_TUNING"
CPT_KIND = "CPT"
MULTITASK_KIND = "MULTITASK_PROMPT_TUNING"

TASK_COLUMNS, TASK_ROWS = "prefix_task_cols", "prefix_task_rows"
SCALE_FIELD = "veneer_prompt_embed_scale"
SCALED_BASES = ("gemma", "gemma2")  # their scale moved from the model into the embedding module

_SIZES = dict.fromkeys(("num_attention_heads", "num_layers"), "sizes keys and values, which this kind does not bring")
_BEGINS = "says how training began; the stored rows are its end"
_ENCODER = "sizes an encoder that was applied before saving"
_CPT_TRAINING = "a rule of training; the stored rows are its end"
IRRELEVANT_FIELDS: Mapping[str, str] = {
    **_SIZES,
    "prompt_tuning_init": _BEGINS,
    "prompt_tuning_init_text": _BEGINS,
    "tokenizer_kwargs": _BEGINS,
    "tokenizer_name_or_path": _BEGINS,
}
P_TUNING_IRRELEVANT_FIELDS: Mapping[str, str] = {
    **_SIZES,
    "encoder_dropout": _ENCODER,
    "encoder_hidden_size": _ENCODER,
    "encoder_num_layers": _ENCODER,
    "encoder_reparameterization_type": _ENCODER,
}
CPT_IRRELEVANT_FIELDS: Mapping[str, str] = {
    **_SIZES,
    "cpt_mask": _CPT_TRAINING,
    "cpt_token_ids": "the tokens' embeddings are part of the stored rows",
    "cpt_tokens_type_mask": _CPT_TRAINING,
    "opt_loss_decay_factor": _CPT_TRAINING,
    "opt_projection_epsilon": _CPT_TRAINING,
    "opt_projection_format_epsilon": _CPT_TRAINING,
    "opt_weighted_loss_type": _CPT_TRAINING,
    "tokenizer_name_or_path": _BEGINS,
}
MULTITASK_IRRELEVANT_FIELDS: Mapping[str, str] = {
    **IRRELEVANT_FIELDS,
    "prompt_tuning_init_state_dict_path": _BEGINS,
    "prompt_tuning_init_task": _BEGINS,
}


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """All decisions about one adapter, made without reading a tensor."""

    report: DecodeReport
    draft: PromptDraft
    scale: float

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """Read the rows, one set a task.

        Raises:
            MalformedAdapter: a tensor holds NaN or infinity, or is not what the header announced; or a product is
                beyond float32.
        """
        rows = read_finite(tensors, ROWS) * self.scale  # [tokens, hidden_size]
        has_tasks = TASK_ROWS in self.draft.own
        if has_tasks:
            rows = rows * (read_finite(tensors, TASK_COLUMNS) @ read_finite(tensors, TASK_ROWS))
        require_finite(rows, ROWS)
        virtual = VirtualTokens(rows if has_tasks else rows[None], has_tasks)
        return self.draft.with_saved(AdapterForms(virtual=virtual), tensors, base)


def plan_prompt_tuning(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> PromptPlan:
    """Decide everything about trained virtual tokens from config and header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    return _plan(draft_prompt(KIND, config, header, spec, irrelevant=IRRELEVANT_FIELDS))


def plan_p_tuning(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> PromptPlan:
    """As `plan_prompt_tuning`."""
    return _plan(draft_prompt(P_TUNING_KIND, config, header, spec, irrelevant=P_TUNING_IRRELEVANT_FIELDS))


def plan_cpt(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> PromptPlan:
    """As `plan_prompt_tuning`."""
    return _plan(draft_prompt(CPT_KIND, config, header, spec, irrelevant=CPT_IRRELEVANT_FIELDS))


def plan_multitask_prompt_tuning(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> PromptPlan:
    """As `plan_prompt_tuning`; a request must name its task."""
    own = (ROWS, TASK_COLUMNS, TASK_ROWS)
    return _plan(draft_prompt(MULTITASK_KIND, config, header, spec, own=own, irrelevant=MULTITASK_IRRELEVANT_FIELDS))


def _plan(draft: PromptDraft) -> PromptPlan:
    embedding = Vocabulary.of(draft.spec).embedding
    width = draft.spec.hidden_size if embedding is None else embedding.out_features
    num_tokens = draft.num_tokens()
    draft.require_field("token_dim", width)
    draft.require(ROWS, (num_tokens, width), "the input embedding")
    if TASK_ROWS in draft.own:
        _check_tasks(draft, num_tokens, width)
    scale, warnings = _read_scale(draft)
    return PromptPlan(draft.report("virtual tokens", warnings=warnings), draft, scale)


def _check_tasks(draft: PromptDraft, num_tokens: int, width: int) -> None:
    num_tasks, _, rank = draft.shape(TASK_COLUMNS, 3)
    draft.require(TASK_COLUMNS, (num_tasks, num_tokens, rank), f'"{ROWS}"')
    draft.require(TASK_ROWS, (num_tasks, rank, width), "the input embedding")
    for field, found in (("num_tasks", num_tasks), ("num_ranks", rank)):
        stated = draft.ledger.use_count(field)
        if stated not in (None, found):
            raise MalformedAdapter(
                f'tensor "{TASK_COLUMNS}" has {found} for field "{field}", which is {stated}. '
                "Correct adapter_config.json, or save the adapter again.",
                tensor=TASK_COLUMNS,
            )


def _read_scale(draft: PromptDraft) -> tuple[float, tuple[str, ...]]:
    value: Any = draft.ledger.use(SCALE_FIELD)
    is_scaled_base = draft.spec.model_type in SCALED_BASES
    if value is None:
        warning = (
            f"If the adapter was trained with transformers 4, its rows need a factor: {draft.spec.model_type} applied "
            f'its embedding scale to them there. Say {{"{SCALE_FIELD}": "sqrt_d"}} in adapter_config.json.'
        )
        return 1.0, (warning,) if is_scaled_base else ()
    if value == 1 and not isinstance(value, bool):
        return 1.0, ()
    if value == "sqrt_d" and is_scaled_base:
        return math.sqrt(draft.spec.hidden_size), ()
    return refuse(SCALE_FIELD, value, f'it is 1, or "sqrt_d" on a base of type {" or ".join(SCALED_BASES)}.')
