"""GraLoRA (https://arxiv.org/abs/2505.20355): k x k blocks of a weight, a low-rank addition to each.

    base_model.model.<path>.gralora_A                   [k, in_features / k, r]
    base_model.model.<path>.gralora_B                   [k, r, out_features / k]
    base_model.model.<path>.gralora_A_general.weight    [hybrid_r, in_features]      where hybrid_r > 0
    base_model.model.<path>.gralora_B_general.weight    [out_features, hybrid_r]     where hybrid_r > 0

    Semantics, block n of the inputs, block q of the outputs, s = r / k ranks between each two:
        h[n] = A[n]^T x[n]                                                        [r]
        y[q] += scaling * sum_n B[q][n * s : (n + 1) * s]^T h[n][q * s : (q + 1) * s],  scaling = alpha / (r + hybrid_r)
        y    += scaling * B_general (A_general x)

All in all one low-rank addition of rank k * r + hybrid_r, most of whose values are 0; or the whole matrix where that is
smaller.

Running example: k = 2, r = 32, hybrid_r = 0 -> rank 64
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import LinearDelta, SiteChange
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import whole_number
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan, served_rank
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "GRALORA"
BLOCKS = ("gralora_A", "gralora_B")
GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")
_DEFAULT_RANK, _DEFAULT_ALPHA, _DEFAULT_BLOCKS = 32, 64, 2


def plan_gralora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a GraLoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "gralora_only"))
    rank = ledger.use_count("r") or _DEFAULT_RANK
    blocks = ledger.use_count("gralora_k") or _DEFAULT_BLOCKS
    alpha = ledger.use_number("alpha", _DEFAULT_ALPHA)
    hybrid = whole_number(ledger, "hybrid_r", 0)
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.set_aside({"gralora_dropout": "dropout is off at inference"})
    ledger.close()
    if rank % blocks:
        raise MalformedAdapter(
            f'field "gralora_k" = {blocks} does not divide the rank {rank} (r). Correct adapter_config.json.',
            field="gralora_k",
            value=blocks,
        )
    suffixes = (*BLOCKS, *GENERAL) if hybrid else BLOCKS
    file = sort_tuner_file(header, spec, suffixes=suffixes)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, suffixes)
        if site.in_features % blocks or site.out_features % blocks:
            raise MalformedAdapter(
                f'field "gralora_k" = {blocks} does not divide the {site.in_features} inputs and {site.out_features} '
                f'outputs of "{site.path}". Use the base that the adapter was trained on.',
                field="gralora_k",
                value=blocks,
            )
        shape_of(header, names["gralora_A"], site, (blocks, ("in", blocks), rank))
        shape_of(header, names["gralora_B"], site, (blocks, rank, ("out", blocks)))
        if hybrid:
            shape_of(header, names[GENERAL[0]], site, (hybrid, "in"))
            shape_of(header, names[GENERAL[1]], site, ("out", hybrid))
        return MatchedSite(site.path, served_rank(site, blocks * rank + hybrid), alpha / (rank + hybrid))

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, _change)


def _change(data: SiteData) -> LinearDelta | SiteChange:
    inputs, outputs = (data.own[suffix] for suffix in BLOCKS)
    blocks, _, rank = inputs.shape
    share = rank // blocks
    if data.matched.rank == 0:
        return SiteChange(dense=_matrix(data, inputs, outputs, share) * data.matched.scaling)
    down = torch.block_diag(*inputs.transpose(1, 2))  # [k * r, in], block n reads block n of the inputs
    up = torch.zeros(blocks, outputs.shape[2], blocks, blocks, share)  # [q, out / k, n, q, s]
    for q, block in enumerate(outputs):
        up[q, :, :, q] = block.T.reshape(-1, blocks, share)
    up = up.reshape(data.site.out_features, blocks * rank)
    if GENERAL[0] in data.own:
        down = torch.cat([down, data.own[GENERAL[0]]])
        up = torch.cat([up, data.own[GENERAL[1]]], dim=1)
    return LinearDelta(down=down, up=up * data.matched.scaling)


def _matrix(data: SiteData, inputs: torch.Tensor, outputs: torch.Tensor, share: int) -> torch.Tensor:
    """The whole matrix before its scaling.  # [out, in]"""
    blocks = len(inputs)
    down = inputs.unflatten(2, (blocks, share))  # [n, in / k, q, s]
    up = outputs.unflatten(1, (blocks, share))  # [q, n, s, out / k]
    matrix = torch.einsum("niqs,qnso->qoni", down, up).reshape(data.site.out_features, data.site.in_features)
    if GENERAL[0] in data.own:
        matrix = matrix + data.own[GENERAL[1]] @ data.own[GENERAL[0]]
    return matrix
