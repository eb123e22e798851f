"""SHiRA (https://arxiv.org/abs/2406.13175): some entries of the weight changed, each by a value of its own.

    base_model.model.<path>.shira_weight      [n]
    base_model.model.<path>.shira_indices     [2, n] integers: rows, then columns      float where Windows saved it

    Semantics:
        y += D x,   D[shira_indices[0, k], shira_indices[1, k]] += shira_weight[k]

D is kept as a whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.refusals import contradiction, refuse_conv1d
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import INTEGER_DTYPES, require_indices, shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "SHIRA"
_VALUES, _PLACES = "shira_weight", "shira_indices"
_DEFAULT_RANK = 32
_STORED = "the places that it chose are stored"


def plan_shira(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a SHiRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    starts_random = not ledger.use_flag("init_weights", True)
    rank = ledger.use_count("r") or _DEFAULT_RANK
    ledger.set_aside({"mask_type": _STORED, "random_seed": _STORED})
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_VALUES, _PLACES))

    def match(site: Site, names: Names) -> MatchedSite:
        refuse_conv1d(site, names, KIND)
        require_all(names, site.path, (_VALUES, _PLACES))
        (number,) = shape_of(header, names[_VALUES], site, (None,))
        shape_of(header, names[_PLACES], site, (2, number), dtypes=(*INTEGER_DTYPES, "F32"))
        if number != rank * (site.in_features + site.out_features):
            raise contradiction(names[_VALUES], f"has {number} values", "r", rank)
        return MatchedSite(site.path, 0, 1.0)

    def update(data: SiteData) -> SiteChange:
        name = file.modules[data.site.path][_PLACES]
        places = _whole_numbers(data.own[_PLACES], name)
        require_indices(places[0], data.site.out_features, name)
        require_indices(places[1], data.site.in_features, name)
        dense = torch.zeros(data.site.out_features, data.site.in_features)
        return SiteChange(dense=dense.index_put((places[0], places[1]), data.own[_VALUES], accumulate=True))

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, update)


def _whole_numbers(values: torch.Tensor, name: str) -> torch.Tensor:
    whole = values.to(torch.int64)
    if bool((whole == values).all()):
        return whole
    raise MalformedAdapter(
        f'tensor "{name}" holds places of entries that are no whole numbers. The file is damaged; save it again.',
        tensor=name,
    )
