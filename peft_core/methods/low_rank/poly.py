"""Poly (https://arxiv.org/abs/2202.13914): low-rank additions of several skills, mixed in fixed shares for each task.

    base_model.model.<path>.poly_lora_A                 [n_splits, n_skills, in_features / n_splits, r]
    base_model.model.<path>.poly_lora_B                 [n_splits, n_skills, r, out_features / n_splits]
    base_model.model.<path>.poly_router.module_logits   [n_tasks, n_splits * n_skills]

    Semantics, for one task:
        share = sigmoid(logits[task]), divided by its sum over the skills of each split
        A, B  = sum over skills of share * poly_lora_A, poly_lora_B; the splits side by side
        y    += B (A x) / r

For one task this is a plain low-rank addition. Which task is served stands in adapter_config.json, in a field that PEFT
does not know: "task_id", an integer from 0. An adapter of one task needs none. Register the adapter once for each task.

Running example: n_tasks = 4, "task_id": 2
    LinearDelta(down=A [r, in], up=B / r [out, r]) of task 2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import UnsupportedAdapter
from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import whole_number
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "POLY"
SUFFIXES = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")
TASK = "task_id"
_DEFAULT_RANK, _DEFAULT_SKILLS = 8, 4
_EPSILON = 1e-12


def plan_poly(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about one task of a Poly adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    rank = ledger.use_count("r") or _DEFAULT_RANK
    skills = ledger.use_count("n_skills") or _DEFAULT_SKILLS
    splits = ledger.use_count("n_splits") or 1
    num_tasks = ledger.use_count("n_tasks") or 1
    task = _read_task(ledger, num_tasks)
    kind = ledger.use("poly_type", "poly")
    if kind != "poly":
        refuse("poly_type", kind, 'known here: "poly". Train with it.')
    ledger.set_aside({"init_weights": "shares are random before training, so every module needs its tensors"})
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=SUFFIXES)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, SUFFIXES)
        shape_of(header, names[SUFFIXES[0]], site, (splits, skills, ("in", splits), rank))
        shape_of(header, names[SUFFIXES[1]], site, (splits, skills, rank, ("out", splits)))
        shape_of(header, names[SUFFIXES[2]], site, (num_tasks, splits * skills))
        return MatchedSite(site.path, rank, 1.0 / rank)

    def formula(data: SiteData) -> LinearDelta:
        down, up, logits = (data.own[suffix] for suffix in SUFFIXES)
        shares = torch.sigmoid(logits[task].view(splits, skills))
        shares = shares / (shares.sum(-1, keepdim=True) + _EPSILON)
        mixed_down = torch.einsum("qs,qsdr->qdr", shares, down).reshape(-1, rank)
        mixed_up = torch.einsum("qs,qsrd->qdr", shares, up).reshape(-1, rank)
        return LinearDelta(down=mixed_down.T, up=mixed_up * data.matched.scaling)

    return TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=True).plan(match, formula)


def _read_task(ledger: ConfigLedger, num_tasks: int) -> int:
    task = whole_number(ledger, TASK, 0) if num_tasks == 1 else whole_number(ledger, TASK, num_tasks)
    if task < num_tasks:
        return task
    raise UnsupportedAdapter(
        f'field "n_tasks" = {num_tasks}: a Poly adapter is served one task at a time. Say which in '
        f'adapter_config.json: "{TASK}": a number from 0 to {num_tasks - 1}. Register the adapter once for each task.',
        field="n_tasks",
        value=num_tasks,
    )
