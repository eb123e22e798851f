"""HiRA (https://openreview.net/forum?id=TwJrTz9cRS): a low-rank matrix that multiplies the weight entry by entry.

    base_model.model.<path>.hira_A     [r, in_features]
    base_model.model.<path>.hira_B     [out_features, r]

    Semantics:
        y += (W * (hira_B hira_A)) x          * entry by entry, no scaling

`rank_pattern` may or may not have been heeded: PEFT reads it for the second adapter of a model only. The tensors say.
The product with W has the rank of W: it is kept as a whole matrix, made with the base's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.refusals import contradiction, refuse_embeddings
from peft_core.methods.report import MatchedSite
from peft_core.methods.targets import first_match, require_endings
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "HIRA"
_SUFFIXES = ("hira_A", "hira_B")
_DEFAULT_RANK = 32


def plan_hira(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a HiRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    rank = ledger.use_count("r") or _DEFAULT_RANK
    patterns = ledger.use_pattern_values("rank_pattern")
    require_endings("rank_pattern", patterns)
    starts_random = config.get("init_weights", True) in (False, None)
    ledger.set_aside({"init_weights": "only says how training began", "hira_dropout": "dropout is off at inference"})
    ledger.close()
    refuse_embeddings(header, "hira_embedding_", KIND)
    file = sort_tuner_file(header, spec, suffixes=_SUFFIXES)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, _SUFFIXES)
        stored, _ = shape_of(header, names["hira_A"], site, (None, "in"))
        shape_of(header, names["hira_B"], site, ("out", stored))
        if stored not in (rank, first_match(patterns, site.path)):
            raise contradiction(names["hira_A"], f"has rank {stored}", "r", rank)
        return MatchedSite(site.path, 0, 1.0)

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, _update, needs_base=True)


def _update(data: SiteData) -> SiteChange:
    return SiteChange(dense=data.weight() * (data.own["hira_B"] @ data.own["hira_A"]))
