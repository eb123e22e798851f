"""IA3 (https://arxiv.org/abs/2205.05638): a trained factor for every output, or every input, of a linear module.

    base_model.model.<path>.ia3_l     [out_features, 1], or [1, in_features] at a feed-forward module

    Semantics:
        y = ia3_l * base(x)                  the bias included
        y = base(ia3_l * x)                  at a module that `feedforward_modules` names

PEFT compares `feedforward_modules` with the end of a path letter by letter, not part by part: "proj" names `q_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.refusals import contradiction
from peft_core.methods.report import FormName, MatchedSite
from peft_core.methods.targets import require_pattern
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import TunerFile, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "IA3"
_FIELD = "feedforward_modules"
_SUFFIX = "ia3_l"


def plan_ia3(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about an IA3 adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    starts_random = not ledger.use_flag("init_ia3_weights", True)
    feedforward = ledger.use_names(_FIELD)
    if isinstance(feedforward, str):
        require_pattern(_FIELD, feedforward)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_SUFFIX,))

    def match(site: Site, names: Names) -> MatchedSite:
        name = names[_SUFFIX]
        scales_input = _is_row(header, name)
        shape_of(header, name, site, (1, "in") if scales_input else ("out", 1))
        is_named = config.get(_FIELD) is not None
        if is_named and scales_input != _is_feedforward(site.path, feedforward):
            raise contradiction(name, f"scales {'inputs' if scales_input else 'outputs'}", _FIELD, config[_FIELD])
        return MatchedSite(site.path, 0, 1.0)

    forms = _forms(file, header)
    return TunerDraft(
        KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random, rankless_forms=forms
    ).plan(match, _factors)


def _factors(data: SiteData) -> SiteChange:
    values = data.own[_SUFFIX]
    return SiteChange(input_gain=values.flatten()) if values.shape[0] == 1 else SiteChange(gain=values.flatten())


def _forms(file: TunerFile, header: Header) -> tuple[FormName, ...]:
    scale_inputs = {_is_row(header, names[_SUFFIX]) for names in file.modules.values()}
    return tuple("input gain" if scales_input else "gain" for scales_input in sorted(scale_inputs))


def _is_row(header: Header, name: str) -> bool:
    return tuple(header[name].shape[:1]) == (1,)


def _is_feedforward(path: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path.endswith(names)
