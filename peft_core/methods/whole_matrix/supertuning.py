"""Super-tuning: the largest (or smallest) entries of the weight changed, and perhaps a LoRA beside them.

    base_model.model.<path>.supertuning_values            [n]
    base_model.model.<path>.supertuning_indices           [n] integers: places in the weight, row after row
    base_model.model.<path>.supertuning_lora_A.weight     [r, in_features]       where r is set
    base_model.model.<path>.supertuning_lora_B.weight     [out_features, r]

    Semantics:
        y += D x + lora_alpha / r * lora_B (lora_A x),   D[places] = values

D is kept as a whole matrix, the LoRA within it. Without stored places (save_precomputed_indices false) PEFT takes the n
entries of the base's weight with the largest magnitude again; their order decides which value is whose, so that is only
possible where no two of them are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from peft_core.errors import UnsupportedAdapter
from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.refusals import contradiction, refuse_conv1d
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import INTEGER_DTYPES, require_indices, shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "SUPERTUNING"
_VALUES, _PLACES = "supertuning_values", "supertuning_indices"
_DOWN, _UP = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
_DEFAULT_SPARSITY = 0.99


class _Choice(NamedTuple):
    """Which entries of a weight are changed, where the file does not say it."""

    sparsity: float
    takes_largest: bool

    def places(self, data: SiteData) -> torch.Tensor:
        """Raises UnsupportedAdapter where two entries are equally large."""
        magnitudes = data.weight().abs().flatten()
        number = len(data.own[_VALUES])
        sign = 1 if self.takes_largest else -1
        ordered, places = torch.sort(sign * magnitudes, descending=True, stable=True)
        chosen = ordered[: number + 1]
        if bool((chosen[1:] == chosen[:-1]).any()):
            raise UnsupportedAdapter(
                f'the file does not say which entries of "{data.site.path}" are changed, and some that may be meant '
                "are equally large in this base, so their order is not known. Save the adapter with "
                "save_precomputed_indices=True.",
                field="save_precomputed_indices",
                value=False,
            )
        return places[:number]


def plan_supertuning(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a super-tuning adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    starts_random = not ledger.use_flag("init_weights", True)
    sparsity = ledger.use_number("sparsity", _DEFAULT_SPARSITY)
    if not 0 <= sparsity < 1:
        refuse("sparsity", sparsity, "it is the share of entries that are left alone, below 1.")
    choice = _Choice(sparsity, ledger.use_flag("select_top", True))
    rank = ledger.use_count("r")
    scaling = _read_scaling(ledger, rank)
    ledger.set_aside({"lora_dropout": "dropout is off at inference"})
    has_places = ledger.use_flag("save_precomputed_indices", True)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_VALUES, _PLACES, _DOWN, _UP))

    def match(site: Site, names: Names) -> MatchedSite:
        refuse_conv1d(site, names, KIND)
        require_all(names, site.path, (_VALUES, *([_PLACES] if has_places else ()), *([_DOWN, _UP] if rank else ())))
        (number,) = shape_of(header, names[_VALUES], site, (None,))
        if number != int(site.in_features * site.out_features * (1 - choice.sparsity)):
            raise contradiction(names[_VALUES], f"has {number} values", "sparsity", choice.sparsity)
        if _PLACES in names:
            shape_of(header, names[_PLACES], site, (number,), dtypes=INTEGER_DTYPES)
        if rank is None and (lora := names.get(_DOWN, names.get(_UP))):
            raise contradiction(lora, "belongs to a LoRA", "r", None)
        if rank is not None:
            shape_of(header, names[_DOWN], site, (rank, "in"))
            shape_of(header, names[_UP], site, ("out", rank))
        return MatchedSite(site.path, 0, scaling)

    def update(data: SiteData) -> SiteChange:
        total = data.site.in_features * data.site.out_features
        if _PLACES in data.own:
            places = require_indices(data.own[_PLACES], total, file.modules[data.site.path][_PLACES])
        else:
            places = choice.places(data)
        flat = torch.zeros(total).index_put((places,), data.own[_VALUES], accumulate=True)
        dense = flat.reshape(data.site.out_features, data.site.in_features)
        return SiteChange(dense=dense + scaling * (data.own[_UP] @ data.own[_DOWN]) if rank else dense)

    are_stored = all(_PLACES in names for names in file.modules.values())
    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, update, needs_base=not are_stored)


def _read_scaling(ledger: ConfigLedger, rank: int | None) -> float:
    if rank is None:
        ledger.set_aside({"lora_alpha": "means nothing without r"})
        return 1.0
    alpha = ledger.use("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        refuse("lora_alpha", alpha, "a number is needed where r is set. Correct adapter_config.json.")
    return float(alpha) / rank
