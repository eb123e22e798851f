"""RoAd (https://arxiv.org/abs/2409.00119): a trained rotation and scale for every pair of outputs.

base_model.model.<path>.road_theta, .road_alpha
    [out_features / 2]     road_1, one angle and one scale a pair
    [out_features]         road_2, one a member of a pair
    [2 * out_features]     road_4, one an entry of each pair's matrix

Semantics, in each group of `group_size` outputs, i in its first half, j = i + group_size / 2:
    y[i] = cos[i] * z[i] - sin[i] * z[j]        z = base(x), the bias included
    y[j] = cos[j] * z[j] + sin[j] * z[i]        cos = alpha * cos(theta), sin = alpha * sin(theta)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.refusals import refuse_conv1d
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "ROAD"
_ANGLES, _SCALES = "road_theta", "road_alpha"
_NUM_HALVES: Mapping[str, int] = {"road_1": 1, "road_2": 2, "road_4": 4}  # values for every two outputs
_DEFAULT_GROUP = 64


def plan_road(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a RoAd adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    starts_random = not ledger.use_flag("init_weights", True)
    variant = ledger.use("variant", "road_1")
    if not isinstance(variant, str) or variant not in _NUM_HALVES:
        refuse("variant", variant, f"known are {', '.join(_NUM_HALVES)}. Correct adapter_config.json.")
    group = ledger.use_count("group_size") or _DEFAULT_GROUP
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_ANGLES, _SCALES))

    def match(site: Site, names: Names) -> MatchedSite:
        refuse_conv1d(site, names, KIND)
        require_all(names, site.path, (_ANGLES, _SCALES))
        _require_groups(site, group)
        for name in names.values():
            shape_of(header, name, site, (_NUM_HALVES[variant] * site.out_features // 2,))
        return MatchedSite(site.path, 0, 1.0)

    return TunerDraft(
        KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random, rankless_forms=("turn",)
    ).plan(match, functools.partial(_turn, variant, group))


def _require_groups(site: Site, group: int) -> None:
    if group % 2 == 0 and site.out_features % group == 0:
        return
    raise MalformedAdapter(
        f'field "group_size" = {group}; the {site.out_features} outputs of "{site.path}" cannot be split into '
        "groups of that many, with two halves each. Use the base that the adapter was trained on.",
        field="group_size",
        value=group,
    )


def _turn(variant: str, group: int, data: SiteData) -> SiteChange:
    angles, scales = data.own[_ANGLES], data.own[_SCALES]
    if variant == "road_4":  # in each group first the cosines' values, then the sines'
        (cos_angles, sin_angles), (cos_scales, sin_scales) = _split(angles, group), _split(scales, group)
    else:
        if variant == "road_1":  # both members of a pair share theirs
            angles, scales = _doubled(angles, group), _doubled(scales, group)
        cos_angles, sin_angles, cos_scales, sin_scales = angles, angles, scales, scales
    return SiteChange(cos=cos_scales * cos_angles.cos(), sin=sin_scales * sin_angles.sin(), turn_group=group)


def _doubled(values: torch.Tensor, group: int) -> torch.Tensor:
    return values.reshape(-1, 1, group // 2).expand(-1, 2, -1).flatten()


def _split(values: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    of_cos, of_sin = values.reshape(-1, 2, group).unbind(1)
    return of_cos.flatten(), of_sin.flatten()
