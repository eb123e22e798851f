"""LoHa (https://arxiv.org/abs/2108.06098): the elementwise product of two low-rank matrices.

    base_model.model.<path>.hada_w1_a, hada_w2_a   [out_features, r]
    base_model.model.<path>.hada_w1_b, hada_w2_b   [r, in_features]

    Semantics:
        y += scaling * ((w1_a w1_b) * (w2_a w2_b)) x,   scaling = alpha / r

The product of a sum of r and a sum of r terms is a sum of r * r terms, each of rank 1: exactly a low-rank addition.
Where its factors would be larger than the whole matrix, it is the matrix.

Running example: r = 8 on 4096 x 4096 -> rank 64
    down[8 * i + j] = w1_b[i] * w2_b[j],   up[:, 8 * i + j] = scaling * w1_a[:, i] * w2_a[:, j]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_core.forms import LinearDelta, SiteChange
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import require_rank
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan, served_rank
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "LOHA"
SUFFIXES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8
_IRRELEVANT: Mapping[str, str] = {
    "module_dropout": "dropout is off at inference",
    "rank_dropout": "dropout is off at inference",
    "rank_dropout_scale": "dropout is off at inference",
    "use_effective_conv2d": "convolutions only",
}


def plan_loha(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a LoHa adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, has_patterns=True)
    default_rank = ledger.use_count("r") or _DEFAULT_RANK
    default_alpha = ledger.use_number("alpha", _DEFAULT_ALPHA)
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.set_aside(_IRRELEVANT)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=SUFFIXES)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, SUFFIXES)
        _, r = shape_of(header, names["hada_w1_a"], site, ("out", None))
        shape_of(header, names["hada_w1_b"], site, (r, "in"))
        shape_of(header, names["hada_w2_a"], site, ("out", r))
        shape_of(header, names["hada_w2_b"], site, (r, "in"))
        require_rank(tuner, site.path, names["hada_w1_a"], r, default_rank)
        return MatchedSite(site.path, served_rank(site, r * r), tuner.alpha(site.path, default_alpha) / r)

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, _change)


def _change(data: SiteData) -> LinearDelta | SiteChange:
    own, site = data.own, data.site
    if data.matched.rank == 0:  # many more terms than the matrix has rows
        first, second = own["hada_w1_a"] @ own["hada_w1_b"], own["hada_w2_a"] @ own["hada_w2_b"]
        return SiteChange(dense=first * second * data.matched.scaling)
    down = own["hada_w1_b"][:, None, :] * own["hada_w2_b"][None, :, :]  # [r, r, in]
    up = own["hada_w1_a"][:, :, None] * own["hada_w2_a"][:, None, :]  # [out, r, r]
    up = up.reshape(site.out_features, -1) * data.matched.scaling
    return LinearDelta(down=down.reshape(-1, site.in_features), up=up)
