"""HRA (https://arxiv.org/abs/2405.17484): the input of a module, reflected several times.

    base_model.model.<path>.hra_u   [in_features, r]      one direction a column, of any length

    Semantics, u_i the columns with length 1:
        W' = W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T)
    with apply_GS the columns are first made orthogonal to each other, one after the other.

A product of r reflections is the identity minus a matrix of rank r (https://doi.org/10.1137/0910005, the WY form):
    I - Y U^T,   y_i = 2 u_i - Y[:i] (U[:i]^T 2 u_i)
so W' - W = -(W Y) U^T exactly. The base's weight is needed.

Running example: r = 8
    LinearDelta(down=U^T [8, in], up=-W Y [out, 8])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "HRA"
DIRECTIONS = "hra_u"
_DEFAULT_RANK = 8


def plan_hra(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about an HRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "hra_only"))
    rank = ledger.use_count("r") or _DEFAULT_RANK
    is_orthogonal = ledger.use_flag("apply_GS")
    starts_random = not ledger.use_flag("init_weights", True) or rank % 2 == 1
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(DIRECTIONS,))

    def match(site: Site, names: Names) -> MatchedSite:
        shape_of(header, names[DIRECTIONS], site, ("in", rank))
        return MatchedSite(site.path, rank, 1.0)

    def formula(data: SiteData) -> LinearDelta:
        u, y = (_orthogonal if is_orthogonal else _reflections)(data.own[DIRECTIONS])
        return LinearDelta(down=u.T, up=-(data.weight() @ y))

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, formula, needs_base=True)


def _reflections(directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U and Y of the product of reflections in the order of the columns.  # [in, r] each"""
    u = directions / directions.norm(dim=0)
    y = torch.zeros_like(u)
    for i in range(u.shape[1]):
        y[:, i] = 2 * u[:, i] - y[:, :i] @ (u[:, :i].T @ (2 * u[:, i]))
    return u, y


def _orthogonal(directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_reflections`, the columns made orthogonal first, in float32 and in PEFT's order: nearly equal columns
    leave little but rounding, which is then part of the adapter."""
    columns: list[torch.Tensor] = []
    for column in directions.T:
        rest = column[:, None]
        for done in columns:
            rest = rest - (done.T @ rest) * done
        columns.append(rest / rest.norm())
    u = torch.cat(columns, dim=1)
    return u, 2 * u
