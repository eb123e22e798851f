"""Trainable tokens: rows of single tokens replaced, in the embedding and wherever its weight is used as well.

    base_model.model.<embedding>.trainable_tokens_delta     [tokens, width], the new rows themselves
    base_model.model.<embedding>.base_layer.weight          the whole table, where the vocabulary was made larger

    Semantics:
        row(token_indices[i]) = trainable_tokens_delta[i]

Where embedding and head are one weight, the head's logits of these tokens are made with the same rows; a file may hold
them twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft_core.errors import MalformedAdapter
from peft_core.forms import AdapterForms
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import DecodeReport
from peft_core.methods.targets import TargetRule, targeted_sites
from peft_core.methods.tensors import Header, TensorSource
from peft_core.methods.tuner.config import read_token_indices, read_tuner_config
from peft_core.methods.tuner.file import sort_tuner_file
from peft_core.methods.tuner.saved_plan import SavedPlan
from peft_core.methods.tuner.vocabulary import Vocabulary
from peft_core.spec import BaseModelSpec

KIND = "TRAINABLE_TOKENS"
ROWS = "trainable_tokens_delta"
_FIELD = "token_indices"
_IRRELEVANT = {"init_weights": "only steers an initialisation"}


@dataclass(frozen=True, slots=True)
class TrainableTokensPlan:
    """All decisions about one adapter, made without reading a tensor."""

    report: DecodeReport
    saved: SavedPlan

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        return self.saved.read(tensors, base)


def plan_trainable_tokens(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TrainableTokensPlan:
    """Decide everything about trainable tokens from config and header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    ledger.refuse_unless_off({"trainable_token_indices": f"tokens of this kind stand in {_FIELD}. Say them there."})
    common = read_tuner_config(ledger)
    ledger.set_aside(_IRRELEVANT)
    token_ids = read_token_indices(ledger, _FIELD).get(None, ())
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(ROWS,), irrelevant=("trainable_tokens_original",))
    stored = {path: tensors[ROWS] for path, tensors in file.modules.items()}
    if not stored or not token_ids:
        raise MalformedAdapter(
            f'field "{_FIELD}" lists {len(token_ids)} tokens and the file has rows of {len(stored)} tables, so the '
            "adapter would do nothing. Save the adapter again.",
            field=_FIELD,
            value=list(token_ids),
        )
    tables = tuple(dict.fromkeys((*_tables(common.rule, spec), *_twins(stored, spec))))
    common = replace(common, token_indices=dict.fromkeys(tables, token_ids))
    saved = replace(file.saved, token_rows=stored).check(common, header, spec, tokens_field=_FIELD)
    other_base = common.other_base(spec)
    report = DecodeReport(
        kind=KIND,
        sites=(),
        num_parameters=saved.num_parameters,
        irrelevant_fields=ledger.irrelevant,
        irrelevant_tensors=file.irrelevant,
        warnings=(*([other_base] if other_base else ()), *saved.warnings),
        forms=saved.forms,
        needs_base=saved.needs_base,
    )
    return TrainableTokensPlan(report, saved)


def _tables(rule: TargetRule | None, spec: BaseModelSpec) -> tuple[str, ...]:
    """The tables that the config means: the input embedding, unless it names others."""
    if rule is None:
        embedding = Vocabulary.of(spec).embedding
        return () if embedding is None else (embedding.path,)
    return tuple(targeted_sites(rule, spec, kinds=("embedding", "head")))


def _twins(stored: Mapping[str, str], spec: BaseModelSpec) -> tuple[str, ...]:
    twins = (Vocabulary.of(spec).twin(path) for path in stored)
    return tuple(path for path in twins if path is not None and path in stored)
