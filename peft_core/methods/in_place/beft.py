"""BEFT: a trained bias for linear modules, whether or not they have one.

base_model.model.<path>.beft_bias     [1, out_features]

Semantics:
    y = base(x) + beft_bias
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.refusals import refuse_conv1d
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "BEFT"
_SUFFIX = "beft_bias"


def plan_beft(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a BEFT adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_SUFFIX,))

    def match(site: Site, names: Names) -> MatchedSite:
        refuse_conv1d(site, names, KIND)
        shape_of(header, names[_SUFFIX], site, (1, "out"))
        return MatchedSite(site.path, 0, 1.0)

    return TunerDraft(
        KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random, rankless_forms=("shift",)
    ).plan(match, _shift)


def _shift(data: SiteData) -> SiteChange:
    return SiteChange(shift=data.own[_SUFFIX].flatten())
