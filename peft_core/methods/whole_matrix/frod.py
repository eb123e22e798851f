"""FRoD: the weight written as U (S + diag(l)) V^T; l and the few entries of S are trained.

    base_model.model.<path>.frod_lambda_l            [in_features]
    base_model.model.<path>.frod_lambda_s_values     [n]
    base_model.frod_V.<category>                     [in_features, in_features]    shared by modules of one role
    base_model.frod_s_indices.<category>             [2, n] integers: rows and columns of S
    base_model.frod_s_size.<category>                [2] integers

    Semantics:
        y = W' x + bias,   W' = U (S + diag(frod_lambda_l)) V^T
        U = the columns of W V^-T, each divided by its norm      W the base's weight

W' is kept as a whole matrix, in place of W.

Running example: model.layers.3.self_attn.q_proj belongs to the category self_attn_q_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import INTEGER_DTYPES, Dimension, require_indices, shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "FROD"
_DIAGONAL, _VALUES = "frod_lambda_l", "frod_lambda_s_values"
_BASIS, _PLACES, _SIZE = "frod_V", "frod_s_indices", "frod_s_size"
_LINE: tuple[Dimension, ...] = ("in",)
_SQUARE: tuple[Dimension, ...] = ("in", "in")
_SMALLEST_NORM = 1e-12
_IRRELEVANT: Mapping[str, str] = {
    "frod_dropout": "dropout is off at inference",
    "progressbar": "a switch of training",
    "projection_prng_key": "the matrices that it made are stored",
    "regularization_alpha": "the matrices that it made are stored",
    "runtime_offload_base_weight": "a switch of training",
    "sparse_rate": "the stored entries say it",
}


def plan_frod(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a FRoD adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "frod_only"))
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.set_aside(_IRRELEVANT)
    if not ledger.use_flag("save_projection", True):
        refuse(
            "save_projection",
            False,
            "without the stored matrices they would be computed from all of the base's weights again, and a computer "
            "with other libraries would find others. Save the adapter with save_projection=True.",
        )
    ledger.close()
    file = sort_tuner_file(
        header,
        spec,
        suffixes=(_DIAGONAL, _VALUES),
        shared=tuple(f"{name}.*" for name in (_BASIS, _PLACES, _SIZE)),
    )

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, (_DIAGONAL, _VALUES))
        basis, places, size = (_shared_name(file.shared, part, site, names) for part in (_BASIS, _PLACES, _SIZE))
        shape_of(header, names[_DIAGONAL], site, _LINE)
        shape_of(header, basis, site, _SQUARE)
        _, number = shape_of(header, places, site, (2, _length(header, places)), dtypes=INTEGER_DTYPES)
        shape_of(header, size, site, (2,), dtypes=INTEGER_DTYPES)
        shape_of(header, names[_VALUES], site, (number,))
        return MatchedSite(site.path, 0, 1.0)

    def replacement(data: SiteData) -> SiteChange:
        category = _category(data.site.path)
        basis, places = data.shared[f"{_BASIS}.{category}"], data.shared[f"{_PLACES}.{category}"]
        side = data.site.in_features
        _require_size(data.shared[f"{_SIZE}.{category}"], side, file.shared[f"{_SIZE}.{category}"])
        require_indices(places, side, file.shared[f"{_PLACES}.{category}"])
        middle = torch.diag(data.own[_DIAGONAL])
        middle = middle.index_put((places[0], places[1]), data.own[_VALUES], accumulate=True)
        return SiteChange(replacement=_directions(data.weight(), basis) @ middle @ basis.T)

    draft = TunerDraft(
        KIND,
        tuner,
        file,
        header,
        spec,
        ledger.irrelevant,
        starts_random=starts_random,
        rankless_forms=("replacement",),
    )
    return draft.plan(match, replacement, needs_base=True)


def _category(path: str) -> str:
    """The role of a module, by which PEFT shares matrices: the last two parts of its path, or one after a number."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(parts[-2:])


def _directions(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The columns of W V^-T with norm 1, in float64; a column without length stays 0.  # [out, in] float32"""
    wide, v = weight.double(), basis.double()
    try:
        columns = torch.linalg.solve(v, wide.T).T
    except RuntimeError:  # singular
        columns = wide @ torch.linalg.pinv(v, rtol=1e-6).T
    norms = columns.norm(dim=0)
    return torch.where(norms > _SMALLEST_NORM, columns / norms, 0.0).float()


def _require_size(size: torch.Tensor, side: int, name: str) -> None:
    if size.tolist() != [side, side]:
        raise MalformedAdapter(
            f'tensor "{name}" says a size of {size.tolist()}; the modules that it belongs to need {[side, side]}. '
            "The file is damaged; save the adapter again.",
            tensor=name,
        )


def _length(header: Header, name: str) -> int:
    return header[name].shape[-1] if header[name].shape else 0


def _shared_name(shared: Mapping[str, str], part: str, site: Site, names: Names) -> str:
    key = f"{part}.{_category(site.path)}"
    if key in shared:
        return shared[key]
    name = next(iter(names.values()))
    raise MalformedAdapter(
        f'tensor "{name}" is there, but base_model.{key}, which belongs to it, is missing. '
        "The file is incomplete; save or upload the adapter again.",
        tensor=name,
    )
