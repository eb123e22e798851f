"""OSF (orthogonal subspace fine-tuning): the smaller singular values and vectors of a weight, trained freely.

    base_model.model.<path>.osf_svd_params.U_low   [out_features, low]
    base_model.model.<path>.osf_svd_params.S_low   [low]
    base_model.model.<path>.osf_svd_params.V_low   [low, in_features]

    Semantics, U S V^T the base's weight, k singular values of which the first `effective_rank` are kept:
        W' = W - U[:, kept:] S[kept:] V[kept:] + U_low S_low V_low,      low = k - kept

Of rank 2 low, which is a whole matrix more often than not. The base's weight is needed.

Running example: effective_rank = 4064 on 4096 x 4096 -> low = 32, rank 64
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter, shown
from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger, is_number
from peft_core.methods.low_rank.decompositions import decomposition_warnings
from peft_core.methods.report import MatchedSite
from peft_core.methods.targets import require_pattern
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "OSF"
SUFFIXES = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")


def plan_osf(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about an OSF adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    default = _rank_value("effective_rank", ledger.use("effective_rank"))
    patterns = _read_patterns(ledger)
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.set_aside({"target_svd_config": "PEFT never reads it"})
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=SUFFIXES)

    def match(site: Site, names: Names) -> MatchedSite | None:
        require_all(names, site.path, SUFFIXES)
        side = min(site.in_features, site.out_features)
        stated = next((rank for pattern, rank in patterns.items() if re.search(pattern, site.path)), default)
        low = side - _kept(stated, side)
        shape_of(header, names[SUFFIXES[0]], site, ("out", low))
        shape_of(header, names[SUFFIXES[1]], site, (low,))
        shape_of(header, names[SUFFIXES[2]], site, (low, "in"))
        return MatchedSite(site.path, 2 * low, 1.0) if low else None

    slow = decomposition_warnings(KIND, file.modules, spec)
    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random, slow)
    return draft.plan(match, _factors, needs_base=True)


def _factors(data: SiteData) -> LinearDelta:
    left, values, right = (data.own[suffix] for suffix in SUFFIXES)
    u, s, v = torch.linalg.svd(data.weight(), full_matrices=False)
    low = len(values)
    up = torch.cat([left * values, -u[:, -low:] * s[-low:]], dim=1)
    return LinearDelta(down=torch.cat([right, v[-low:]]), up=up)


def _kept(stated: float | None, side: int) -> int:
    """How many singular values are kept; a fraction of them, or half of them, where the config says so."""
    if stated is None:
        return side // 2
    kept = int(side * stated) if not isinstance(stated, int) and 0 < stated <= 1 else int(stated)
    return max(0, min(side, kept))


def _read_patterns(ledger: ConfigLedger) -> dict[str, float | None]:
    """Ranks by pattern, each searched anywhere in a module's path, the first that is found counts."""
    patterns = ledger.use("rank_pattern", {})
    if not isinstance(patterns, dict):
        raise MalformedAdapter(
            f'field "rank_pattern" = {shown(patterns)}; expected ranks by pattern. Correct adapter_config.json.',
            field="rank_pattern",
            value=patterns,
        )
    for pattern in patterns:
        require_pattern("rank_pattern", pattern)
    return {pattern: _rank_value("rank_pattern", value) for pattern, value in patterns.items()}


def _rank_value(field: str, value: object) -> float | None:
    if value is None or is_number(value):
        return value  # type: ignore[return-value]
    raise MalformedAdapter(
        f'field "{field}" = {shown(value)}; expected a rank, or a fraction of one. Correct adapter_config.json.',
        field=field,
        value=value,
    )
