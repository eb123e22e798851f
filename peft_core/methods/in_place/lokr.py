"""LoKr (https://arxiv.org/abs/2108.06098, LyCORIS): an addition that is a Kronecker product.

    base_model.model.<path>.lokr_w1     [o1, i1]     or lokr_w1_a [o1, r] and lokr_w1_b [r, i1]
    base_model.model.<path>.lokr_w2     [o2, i2]     or lokr_w2_a [o2, r] and lokr_w2_b [r, i2]

    Semantics, o1 * o2 = out_features, i1 * i2 = in_features:
        y += scaling * kron(w1, w2) x,   scaling = alpha / r, even where neither factor is low-rank

Running example: 64 x 64, w1 [8, 8], w2 [8, 8]
    kron_left = scaling * w1, kron_right = w2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import BaseMismatch, MalformedAdapter
from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.refusals import refuse_conv1d
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import require_rank
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "LOKR"
_LEFT, _RIGHT = "lokr_w1", "lokr_w2"
_SUFFIXES = (_LEFT, f"{_LEFT}_a", f"{_LEFT}_b", _RIGHT, f"{_RIGHT}_a", f"{_RIGHT}_b")
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8
_SIZES = "the sizes of the stored factors say it"
_IRRELEVANT: Mapping[str, str] = {
    "decompose_both": _SIZES,
    "decompose_factor": _SIZES,
    "module_dropout": "dropout is off at inference",
    "rank_dropout": "dropout is off at inference",
    "rank_dropout_scale": "dropout is off at inference",
    "use_effective_conv2d": "convolutions only",
}


def plan_lokr(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a LoKr adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, has_patterns=True)
    default_rank = ledger.use_count("r") or _DEFAULT_RANK
    default_alpha = ledger.use_number("alpha", _DEFAULT_ALPHA)
    starts_random = ledger.use_start("lycoris") in (False, "lycoris")
    ledger.set_aside(_IRRELEVANT)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=_SUFFIXES)

    def match(site: Site, names: Names) -> MatchedSite:
        refuse_conv1d(site, names, KIND)
        rank = tuner.rank(site.path, default_rank) or default_rank
        left, right = (_factor_shape(side, site, names, header) for side in (_LEFT, _RIGHT))
        for side in (_LEFT, _RIGHT):
            if side not in names:
                require_rank(tuner, site.path, names[f"{side}_b"], header[names[f"{side}_b"]].shape[0], default_rank)
        _require_product(site, next(iter(names.values())), left, right)
        return MatchedSite(site.path, 0, tuner.alpha(site.path, default_alpha) / rank)

    return TunerDraft(
        KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random, rankless_forms=("kron",)
    ).plan(match, _factors)


def _factors(data: SiteData) -> SiteChange:
    return SiteChange(kron_left=data.matched.scaling * _factor(data, _LEFT), kron_right=_factor(data, _RIGHT))


def _factor(data: SiteData, side: str) -> torch.Tensor:
    return data.own[side] if side in data.own else data.own[f"{side}_a"] @ data.own[f"{side}_b"]


def _factor_shape(side: str, site: Site, names: Names, header: Header) -> tuple[int, int]:
    """Outputs and inputs of one factor, stored whole or as a product."""
    first, second = f"{side}_a", f"{side}_b"
    if side not in names:
        require_all(names, site.path, (first, second) if {first, second} & names.keys() else (side,))
        outputs, rank = shape_of(header, names[first], site, (None, None))
        _, inputs = shape_of(header, names[second], site, (rank, None))
        return outputs, inputs
    for part in (first, second):
        if part in names:
            raise MalformedAdapter(
                f'tensor "{names[part]}" is a part of a factor that is also there as a whole, "{names[side]}". '
                "Save the adapter again.",
                tensor=names[part],
            )
    outputs, inputs = shape_of(header, names[side], site, (None, None))
    return outputs, inputs


def _require_product(site: Site, name: str, left: tuple[int, int], right: tuple[int, int]) -> None:
    product = [left[0] * right[0], left[1] * right[1]]
    if product != [site.out_features, site.in_features]:
        raise BaseMismatch(
            f'tensor "{name}" and its other factor make a matrix of shape {product}; "{site.path}" of this base needs '
            f"{[site.out_features, site.in_features]}. Use the base that the adapter was trained on.",
            tensor=name,
        )
