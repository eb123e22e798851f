"""VB-LoRA (https://arxiv.org/abs/2405.15179): low-rank factors put together from one bank of short vectors.

    base_model.vblora_vector_bank             [num_vectors, length]                 shared
    base_model.model.<path>.vblora_logits_A   [r, in_features / length, num_vectors]
    base_model.model.<path>.vblora_logits_B   [out_features / length, r, num_vectors]
or, with save_only_topk_weights, in place of each logits
    ..._topk_indices                          [..., topk]          integers
    ..._topk_weights                          [..., topk - 1]      the last weight is what is left to 1

    Semantics, each piece of a factor is a mixture of `topk` vectors of the bank:
        piece = sum_k softmax(largest topk logits)[k] * bank[index k]
        y += B (A x),   A from its pieces side by side, B from its pieces one below the other

Running example: r = 4, length 256, topk 2, on 4096 x 4096
    A: 4 x 16 pieces of 256 values -> [4, 4096]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import INTEGER_DTYPES, Dimension, require_indices, shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "VBLORA"
BANK = "vblora_vector_bank"
LOGITS = ("vblora_logits_A", "vblora_logits_B")
CHOSEN = tuple(f"{name}_topk_{part}" for name in LOGITS for part in ("indices", "weights"))
_DEFAULTS = {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2}
_IRRELEVANT: Mapping[str, str] = {
    "init_logits_std": "only says how training began",
    "init_vector_bank_bound": "only says how training began",
    "save_only_topk_weights": "the file itself tells",
    "vblora_dropout": "dropout is off at inference",
}


def plan_vblora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a VB-LoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "vblora_only"))
    rank, vectors, length, topk = (ledger.use_count(name) or default for name, default in _DEFAULTS.items())
    ledger.set_aside(_IRRELEVANT)
    ledger.close()
    if topk > vectors:
        raise MalformedAdapter(
            f'field "topk" = {topk}, but the bank has {vectors} vectors (num_vectors). Correct adapter_config.json.',
            field="topk",
            value=topk,
        )
    file = sort_tuner_file(header, spec, suffixes=(*LOGITS, *CHOSEN), shared=(BANK,))
    if BANK not in file.shared:
        raise MalformedAdapter(
            f'tensor "base_model.{BANK}" is missing: the factors are made of it. Save the adapter again.',
            tensor=f"base_model.{BANK}",
        )
    shape_of(header, file.shared[BANK], None, (vectors, length))

    sizes: dict[str, tuple[Dimension, Dimension]] = {
        LOGITS[0]: (rank, ("in", length)),
        LOGITS[1]: (("out", length), rank),
    }

    def match(site: Site, names: Names) -> MatchedSite:
        _require_one_form(site, names)
        _require_pieces(site, length, next(iter(names.values())))
        for name, pieces in sizes.items():
            if name in names:
                shape_of(header, names[name], site, (*pieces, vectors))
                continue
            shape_of(header, names[f"{name}_topk_indices"], site, (*pieces, topk), dtypes=INTEGER_DTYPES)
            shape_of(header, names[f"{name}_topk_weights"], site, (*pieces, topk - 1))
        return MatchedSite(site.path, rank, 1.0)

    def formula(data: SiteData) -> LinearDelta:
        down, up = (_pieces(data, name, topk) for name in LOGITS)  # [r, in/l, l], [out/l, r, l]
        return LinearDelta(down=down.flatten(1), up=up.transpose(1, 2).flatten(0, 1))

    return TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=True).plan(match, formula)


def _pieces(data: SiteData, name: str, topk: int) -> torch.Tensor:
    """Mixtures of the bank's vectors.  # [..., length]"""
    bank = data.shared[BANK]
    if name in data.own:
        chosen, indices = data.own[name].topk(topk, dim=-1)
        weights = torch.softmax(chosen, dim=-1)
    else:
        indices = require_indices(data.own[f"{name}_topk_indices"], len(bank), f"{data.site.path}.{name}_topk_indices")
        stored = data.own[f"{name}_topk_weights"]
        weights = torch.cat([stored, 1.0 - stored.sum(-1, keepdim=True)], dim=-1)
    return torch.einsum("...k,...kl->...l", weights, bank[indices])


def _require_one_form(site: Site, names: Names) -> None:
    """All logits, or all that was chosen of them, and not both."""
    form = CHOSEN if set(names) & set(CHOSEN) else LOGITS
    require_all(names, site.path, form)
    for suffix, name in names.items():
        if suffix not in form:
            raise MalformedAdapter(
                f'tensor "{name}" is there beside the weights that were chosen of it, so one of them is not of this '
                "adapter. Save the adapter again.",
                tensor=name,
            )


def _require_pieces(site: Site, length: int, name: str) -> None:
    if site.in_features % length == 0 and site.out_features % length == 0:
        return
    raise MalformedAdapter(
        f'field "vector_length" = {length} does not divide the {site.in_features} inputs and {site.out_features} '
        f'outputs of "{site.path}". Use the base that the adapter was trained on.',
        field="vector_length",
        value=length,
        tensor=name,
    )
