"""Uni-LoRA (https://arxiv.org/abs/2506.00799): all low-rank factors of a model drawn from one short trained vector.

    base_model.unilora_theta_d                   [d]                      shared, all that was trained
    base_model.model.<path>.unilora_indices_A    [r, in_features]         with save_indices only, and their
    base_model.model.<path>.unilora_indices_B    [out_features, r]        unilora_scales_A, unilora_scales_B

    Semantics, every value of a factor is one of theta's, each of which stands in `count` places of the whole model:
        A[i, j] = theta[index] / sqrt(count of index)
        y += B (A x)

Which value stands where is not stored but drawn: 0 to d - 1 repeated until all places are full, what remains chosen
without repetition, then shuffled, all by `numpy.random.default_rng(proj_seed)`; handed out module by module in the
base's order, A before B. So the config alone says which modules are changed.

Running example: r = 4, d = 256 on two modules of 64 x 64
    2 * (4 * 64 + 64 * 4) = 1024 places, each of theta's values in four of them
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from peft_core.errors import MalformedAdapter, UnsupportedAdapter
from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import FLOAT_DTYPES, Header
from peft_core.methods.tuner.checks import require_targets, whole_number
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import INTEGER_DTYPES, require_indices, shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "UNILORA"
THETA = "unilora_theta_d"
INDICES = ("unilora_indices_A", "unilora_indices_B")
SCALES = ("unilora_scales_A", "unilora_scales_B")
_DEFAULT_RANK, _DEFAULT_SEED, _DEFAULT_LENGTH = 4, 42, 256
_MAX_PLACES = 2**28  # 2 GiB of indices
_IRRELEVANT: Mapping[str, str] = {
    "init_theta_d_bound": "only says how training began",
    "init_weights": "only says how training began",
    "save_indices": "the file itself tells",
    "unilora_dropout": "dropout is off at inference",
}


def plan_unilora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a Uni-LoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "unilora_only"))
    rank = ledger.use_count("r") or _DEFAULT_RANK
    length = ledger.use_count("theta_d_length") or _DEFAULT_LENGTH
    seed = whole_number(ledger, "proj_seed", _DEFAULT_SEED)
    ledger.set_aside(_IRRELEVANT)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(*INDICES, *SCALES), shared=(THETA,))
    if THETA not in file.shared:
        raise MalformedAdapter(
            f'tensor "base_model.{THETA}" is missing: it holds all that was trained. Save the adapter again.',
            tensor=f"base_model.{THETA}",
        )
    shape_of(header, file.shared[THETA], None, (length,))
    is_stored = bool(file.modules)
    places = {} if is_stored else _places(require_targets(tuner, spec), rank, spec)

    def match(site: Site, names: Names) -> MatchedSite:
        if is_stored:
            require_all(names, site.path, (*INDICES, *SCALES))
            for (of_down, of_up), dtypes in ((INDICES, INTEGER_DTYPES), (SCALES, FLOAT_DTYPES)):
                shape_of(header, names[of_down], site, (rank, "in"), dtypes=dtypes)
                shape_of(header, names[of_up], site, ("out", rank), dtypes=dtypes)
        return MatchedSite(site.path, rank, 1.0)

    def prepare(shared: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if is_stored:
            return shared
        indices = _drawn_indices(max(last for _, last in places.values()), length, seed)
        scaled = shared[THETA] * _scales(indices, length)
        return {"values": scaled[indices]}

    def formula(data: SiteData) -> LinearDelta:
        site = data.site
        if not is_stored:
            first, last = places[site.path]
            middle = first + rank * site.in_features
            values = data.shared["values"]
            return LinearDelta(values[first:middle].view(rank, -1), values[middle:last].view(-1, rank))
        down, up = (
            data.shared[THETA][require_indices(data.own[index], length, f"{site.path}.{index}")] * data.own[scale]
            for index, scale in zip(INDICES, SCALES, strict=True)
        )
        return LinearDelta(down, up)

    draft = TunerDraft(
        KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=True, module_free=not is_stored
    )
    return draft.plan(match, formula, prepare=prepare)


def _places(paths: Collection[str], rank: int, spec: BaseModelSpec) -> dict[str, tuple[int, int]]:
    """From which place to which each module takes its values, A before B."""
    sizes = [rank * (spec.sites[path].in_features + spec.sites[path].out_features) for path in paths]
    ends = list(accumulate(sizes))
    if ends[-1] > _MAX_PLACES:
        raise UnsupportedAdapter(
            f'field "r" = {rank} makes {ends[-1]} values of {len(ends)} modules; at most {_MAX_PLACES} are drawn. '
            "Train with a smaller rank, or on fewer modules.",
            field="r",
            value=rank,
        )
    return {path: (end - size, end) for path, size, end in zip(paths, sizes, ends, strict=True)}


def _drawn_indices(num_places: int, length: int, seed: int) -> torch.Tensor:
    """Which of theta's values stands in each place.  # [num_places] int64"""
    generator = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), num_places // length)
    remaining = num_places % length
    if remaining:
        indices = np.concatenate([indices, generator.choice(length, size=remaining, replace=False)])
    generator.shuffle(indices)
    return torch.from_numpy(indices)


def _scales(indices: torch.Tensor, length: int) -> torch.Tensor:
    """1 / sqrt(how often each value stands somewhere), 0 for one that does not.  # [length]"""
    counts = torch.bincount(indices, minlength=length).float()
    return torch.where(counts > 0, counts.clamp(min=1).rsqrt(), torch.zeros(()))
