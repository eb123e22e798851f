"""DeLoRA (https://arxiv.org/abs/2503.18225): a low-rank addition whose directions and strength are kept apart.

    base_model.model.<path>.delora_A        [r, in_features]
    base_model.model.<path>.delora_B        [out_features, r]
    base_model.model.<path>.delora_lambda   [1]               the strength
    base_model.model.<path>.delora_w_norm   [in_features]     of the base's columns, fixed when training began

    Semantics, A_i the rows of A and B_i the columns of B, norms not below 1e-4:
        y += sum_i lambda / (r |A_i| |B_i|) B_i (A_i . (w_norm * x))

Running example: r = 8
    LinearDelta(down=A * w_norm [8, in], up=B * lambda / (8 |A_i| |B_i|) [out, 8])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import require_rank
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "DELORA"
SUFFIXES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_DEFAULT_RANK = 8
_SMALLEST_NORM = 1e-4
_IRRELEVANT: Mapping[str, str] = {
    "delora_lambda": "only where training began; the trained values are in the file",
    "lambda_pattern": "only where training began; the trained values are in the file",
    "module_dropout": "dropout is off at inference",
}


def plan_delora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a DeLoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    ledger.refuse_unless_off({"alpha_pattern": "DeLoRA has no alpha. Remove the field."})
    tuner = read_tuner_config(ledger, has_patterns=True, biases=("all", "delora_only"))
    default_rank = ledger.use_count("r") or _DEFAULT_RANK
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.set_aside(_IRRELEVANT)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=SUFFIXES)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, SUFFIXES)
        rank, _ = shape_of(header, names["delora_A"], site, (None, "in"))
        shape_of(header, names["delora_B"], site, ("out", rank))
        shape_of(header, names["delora_lambda"], site, (1,))
        shape_of(header, names["delora_w_norm"], site, ["in"])
        require_rank(tuner, site.path, names["delora_A"], rank, default_rank)
        return MatchedSite(site.path, rank, 1.0)

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, _factors)


def _factors(data: SiteData) -> LinearDelta:
    down, up, strength, widths = (data.own[suffix] for suffix in SUFFIXES)
    norms = down.norm(dim=1).clamp(min=_SMALLEST_NORM) * up.norm(dim=0).clamp(min=_SMALLEST_NORM)
    return LinearDelta(down=down * widths, up=up * (strength / (len(down) * norms)))
