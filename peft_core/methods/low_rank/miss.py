"""MiSS (https://arxiv.org/abs/2409.15371), formerly Bone: the input folded to r values, then one small matrix.

    base_model.model.<path>.miss_block   [r, out_features]            plain
                                         [r, mini_r]                  init_weights "mini": repeated along the outputs
                                         [out_features / r, r, r]     init_weights "bat"
    (bone_block in the files of Bone)

    Semantics:
        plain, mini   y += miss_block^T fold(x),   fold(x)[i] = x[i] + x[i + r] + x[i + 2 r] + ...
        bat           each block of r x r of W, in the block row n:   W += W block[n] + block[n]

Plain and mini are low-rank with a fixed down side of ones. "bat" is a whole matrix and needs the base's weight.

Running example: r = 4 on 10 inputs
    down[1] = [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import LinearDelta, SiteChange
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "MISS"
KIND_BONE = "BONE"
BLOCK = "miss_block"
BONE_BLOCK = "bone_block"
_DEFAULT_RANK = 64
_DROPOUT = {"miss_dropout": "dropout is off at inference"}


def plan_miss(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a MiSS adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    ledger.set_aside(_DROPOUT)
    mini_rank = ledger.use_count("mini_r") or 1
    return _plan(KIND, BLOCK, ledger, mini_rank, header, spec)


def plan_bone(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """As `plan_miss`, of the files that PEFT wrote under the former name; it had no "mini"."""
    return _plan(KIND_BONE, BONE_BLOCK, ConfigLedger(config), None, header, spec)


def _plan(
    kind: str, suffix: str, ledger: ConfigLedger, mini_rank: int | None, header: Header, spec: BaseModelSpec
) -> TunerPlan:
    tuner = read_tuner_config(ledger, biases=("all", f"{kind.lower()}_only"))
    rank = ledger.use_count("r") or _DEFAULT_RANK
    start = ledger.use("init_weights", True)
    if not isinstance(start, bool) and start not in ("bat", *(("mini",) if mini_rank else ())):
        refuse("init_weights", start, f"{kind} of another form than those known here. Train with true.")
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(suffix,))
    is_bat, columns = start == "bat", mini_rank if start == "mini" else None

    def match(site: Site, names: Names) -> MatchedSite:
        name = names[suffix]
        _require_divisible(site, name, rank, is_bat=is_bat, columns=columns)
        if is_bat:
            shape_of(header, name, site, (("out", rank), rank, rank))
            return MatchedSite(site.path, 0, 1.0)
        shape_of(header, name, site, (rank, "out" if columns is None else columns))
        return MatchedSite(site.path, rank, 1.0)

    def formula(data: SiteData) -> LinearDelta | SiteChange:
        block = data.own[suffix]
        if is_bat:
            return SiteChange(dense=_bat(data.weight(), block))
        up = block if columns is None else block.repeat(1, data.site.out_features // columns)
        return LinearDelta(down=_folding(rank, data.site.in_features), up=up.T)

    draft = TunerDraft(kind, tuner, file, header, spec, ledger.irrelevant, starts_random=start is False)
    return draft.plan(match, formula, needs_base=is_bat)


def _folding(rank: int, num_inputs: int) -> torch.Tensor:
    """Which inputs each of the r values adds up.  # [r, in]"""
    return torch.eye(rank).repeat(1, -(-num_inputs // rank))[:, :num_inputs]


def _bat(weight: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Each block of W times the block of its row, plus that block.  # [out, in]"""
    rank = block.shape[-1]
    blocks = weight.unflatten(1, (-1, rank)).unflatten(0, (-1, rank)).permute(2, 0, 1, 3)  # [in / r, out / r, r, r]
    changes: torch.Tensor = (blocks @ block + block).permute(1, 2, 0, 3)
    return changes.reshape(weight.shape)


def _require_divisible(site: Site, name: str, rank: int, *, is_bat: bool, columns: int | None) -> None:
    field, divisor, sides = "r", rank, [site.in_features, site.out_features] if is_bat else []
    if columns is not None:
        field, divisor, sides = "mini_r", columns, [site.out_features]
    if rank <= site.in_features and not any(side % divisor for side in sides):
        return
    raise MalformedAdapter(
        f'field "{field}" = {divisor if sides else rank} does not go with "{site.path}", which has {site.in_features} '
        f"inputs and {site.out_features} outputs. Use the base that the adapter was trained on.",
        field=field,
        value=divisor,
        tensor=name,
    )
