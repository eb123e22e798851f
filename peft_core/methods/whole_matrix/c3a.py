"""C3A (https://arxiv.org/abs/2407.19342): an addition whose blocks are circulant: each one row, turned.

    base_model.model.<path>.c3a_kernel     [out_features / block, in_features / block, block] float32

    Semantics, for block row m and block column n, i and j within them:
        y += D x,   D[m * block + i, n * block + j] = c3a_kernel[m, n, (j - i) mod block] / in_features

D is kept as a whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.refusals import contradiction, refuse_conv1d, require_whole_blocks
from peft_core.methods.report import MatchedSite
from peft_core.methods.targets import first_match, require_endings
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "C3A"
_SUFFIX = "c3a_kernel"
_DEFAULT_BLOCK = 256


def plan_c3a(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a C3A adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "c3a_only"))
    start = ledger.use_start("gaussian", "kaiming_uniform", "xavier_uniform", default="xavier_uniform")
    starts_random = start is not True
    default_block = ledger.use_count("block_size") or _DEFAULT_BLOCK
    blocks = ledger.use_pattern_values("block_size_pattern")
    require_endings("block_size_pattern", blocks)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_SUFFIX,))

    def match(site: Site, names: Names) -> MatchedSite:
        refuse_conv1d(site, names, KIND)
        name = names[_SUFFIX]
        _, _, block = shape_of(header, name, site, (None, None, None))
        stated = first_match(blocks, site.path)
        stated = default_block if stated is None else stated
        if block != stated:
            raise contradiction(name, f"has blocks of {block}", "block_size", stated)
        shape_of(header, name, site, (("out", block), ("in", block), block))
        require_whole_blocks(site, name, block, "in", "out")
        return MatchedSite(site.path, 0, 1.0)

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, _circulant)


def _circulant(data: SiteData) -> SiteChange:
    kernel = data.own[_SUFFIX]
    block = kernel.shape[-1]
    steps = torch.arange(block)
    turned = kernel[:, :, (steps[None, :] - steps[:, None]) % block]  # [out / block, in / block, block, block]
    dense = turned.permute(0, 2, 1, 3).reshape(data.site.out_features, data.site.in_features)
    return SiteChange(dense=dense / data.site.in_features)
