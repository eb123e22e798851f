"""DEFT: a few directions of a module's output are taken out of the base's weight, and others put in.

    base_model.model.<path>.deft_P   [out_features, r]     the directions
    base_model.model.<path>.deft_R   [r, in_features]      what is put in; not there with para=True

    Semantics, by decomposition_method:
        "relu"   Q = P,                     right = relu(P)
        "qr"     Q = orthonormalised P,     right = Q
        W' = W + Q (scaling * R - right^T W),     scaling = alpha / r, or 1 without alpha

Of rank r, but right^T W needs the base's weight.

Running example: r = 8
    LinearDelta(down=scaling * R - right^T W [8, in], up=Q [out, 8])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "DEFT"
DIRECTIONS, INJECTION = "deft_P", "deft_R"
_DEFAULT_RANK = 8
_IRRELEVANT: Mapping[str, str] = {
    "deft_dropout": "dropout is off at inference",
    "init_scale": "only says how training began",
}


def plan_deft(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a DEFT adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "deft_only"))
    rank = ledger.use_count("r") or _DEFAULT_RANK
    alpha = ledger.use_number("alpha", 0)
    method = ledger.use("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        refuse("decomposition_method", method, 'known here: "relu" and "qr". Train with one of them.')
    only_removes = ledger.use_flag("para")
    starts_random = not ledger.use_flag("init_weights", True) or only_removes
    ledger.set_aside(_IRRELEVANT)
    ledger.close()
    suffixes = (DIRECTIONS,) if only_removes else (DIRECTIONS, INJECTION)
    file = sort_tuner_file(header, spec, suffixes=suffixes)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, suffixes)
        own_rank = min(rank, site.out_features)
        shape_of(header, names[DIRECTIONS], site, ("out", own_rank))
        if not only_removes:
            shape_of(header, names[INJECTION], site, (own_rank, "in"))
        return MatchedSite(site.path, own_rank, alpha / own_rank if alpha else 1.0)

    def formula(data: SiteData) -> LinearDelta:
        directions = data.own[DIRECTIONS]
        up = directions if method == "relu" else torch.linalg.qr(directions).Q
        right = torch.relu(directions) if method == "relu" else up
        removed = right.T @ data.weight()
        down = -removed if only_removes else data.own[INJECTION] * data.matched.scaling - removed
        return LinearDelta(down=down, up=up)

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, formula, needs_base=True)
