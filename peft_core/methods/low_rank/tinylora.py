"""TinyLoRA: a module's first singular directions, mixed by a matrix that a handful of trained numbers decide.

    base_model.model.<path>.tinylora_A    [r, in_features]      sqrt(S) V^T of the base's weight, frozen
    base_model.model.<path>.tinylora_B    [out_features, r]     U sqrt(S), frozen
    base_model.model.<path>.tinylora_P    [u, r, r]             random, frozen; perhaps not stored
    base_model.tinylora_v.<group>         [u]                   all that was trained; modules of a group share it

    Semantics, v of the module's group:
        y += B (sum_i v[i] P[i]) A x

On an embedding A and B are those of its table, B [vocabulary, r], and the row of a token is added to what the module
returns.

Modules are numbered in the base's order, as far as the config targets them. With weight_tying = t, n modules have
round(n (1 - t)) groups. With save_projection=False, P is drawn again as PEFT draws it: a normal distribution of
standard deviation 1 / sqrt(r), from the seed projection_seed + number of the module.

Running example: u = 64, r = 2, no tying, on 4096 x 4096
    LinearDelta(down=R A [2, 4096], up=B [4096, 2]),   R = sum_i v[i] P[i]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter, UnsupportedAdapter
from peft_core.forms import EmbeddingChange, LinearDelta
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import require_targets, whole_number
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import TunerFile, require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site, SiteKind

KIND = "TINYLORA"
FACTORS = ("tinylora_A", "tinylora_B")
PROJECTION = "tinylora_P"
VECTOR = "tinylora_v"
_DEFAULT_RANK, _DEFAULT_LENGTH, _DEFAULT_SEED = 2, 64, 42
_KINDS: tuple[SiteKind, ...] = ("linear", "head", "embedding")
_MAX_DRAWN = 2**26  # values of one module
_IRRELEVANT: Mapping[str, str] = {
    "init_v_bound": "only says how training began",
    "save_projection": "the file itself tells",
    "tinylora_dropout": "dropout is off at inference",
}
_REGENERATED = "The random matrices are not in the file and are drawn again from projection_seed, as PEFT draws them."


def plan_tinylora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a TinyLoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "tinylora_only"))
    rank = ledger.use_count("r") or _DEFAULT_RANK
    length = ledger.use_count("u") or _DEFAULT_LENGTH
    seed = whole_number(ledger, "projection_seed", _DEFAULT_SEED)
    tying = _read_tying(ledger)
    start = ledger.use_start("uniform")
    ledger.set_aside(_IRRELEVANT)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(*FACTORS, PROJECTION), shared=(f"{VECTOR}.*",))
    numbers = {path: number for number, path in enumerate(require_targets(tuner, spec, _KINDS))}
    groups = _groups(numbers, tying)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, FACTORS)
        own_rank = min(rank, site.in_features, site.out_features)
        is_embedding = site.kind == "embedding"
        if is_embedding:
            _require_token_table(site, names[FACTORS[0]], spec)
        shape_of(header, names[FACTORS[0]], site, (own_rank, "out" if is_embedding else "in"))
        shape_of(header, names[FACTORS[1]], site, ("in" if is_embedding else "out", own_rank))
        if PROJECTION not in names and length * own_rank * own_rank > _MAX_DRAWN:
            raise UnsupportedAdapter(
                f'field "u" = {length}: random matrices of {length} x {own_rank} x {own_rank} values are too large to '
                "be drawn again. Save the adapter with save_projection=True.",
                field="u",
                value=length,
            )
        if PROJECTION in names:
            shape_of(header, names[PROJECTION], site, (length, own_rank, own_rank))
        vector = groups.get(site.path, "")
        require_all({**names, **file.shared}, site.path, (vector,))
        shape_of(header, file.shared[vector], None, (length,))
        return MatchedSite(site.path, own_rank, 1.0)

    def formula(data: SiteData) -> LinearDelta | EmbeddingChange:
        down, up = (data.own[suffix] for suffix in FACTORS)
        projection = data.own.get(PROJECTION)
        if projection is None:
            projection = _drawn(length, len(down), seed + numbers[data.site.path])
        mixing = torch.einsum("i,ijk->jk", data.shared[groups[data.site.path]], projection)
        if data.site.kind == "embedding":
            return EmbeddingChange(down=up.T, up=(mixing @ down).T)
        return LinearDelta(down=mixing @ down, up=up)

    is_drawn = any(PROJECTION not in names for names in file.modules.values())
    warnings = (_REGENERATED,) if is_drawn else ()
    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, start is not True, warnings, kinds=_KINDS)
    plan = draft.plan(match, formula)
    _require_used(file, groups)
    return plan


def _groups(numbers: Mapping[str, int], tying: float) -> dict[str, str]:
    """The shared name of each module's vector."""
    num_groups = max(1, round(len(numbers) * (1.0 - tying)))
    size = max(1, len(numbers) // num_groups)
    return {path: f"{VECTOR}.{min(number // size, num_groups - 1)}" for path, number in numbers.items()}


def _require_used(file: TunerFile, groups: Mapping[str, str]) -> None:
    unused = [name for shared, name in file.shared.items() if shared not in set(groups.values())]
    if unused:
        raise MalformedAdapter(
            f'tensor "{unused[0]}" belongs to no module: the config makes {len(set(groups.values()))} groups of '
            f"{len(groups)} modules. Correct weight_tying or target_modules, or save the adapter again.",
            tensor=unused[0],
        )


def _require_token_table(site: Site, name: str, spec: BaseModelSpec) -> None:
    """PEFT adds to what the module returns: after the scale that Gemma's has, which a form stands before."""
    if site.in_features == spec.vocab_size and not spec.model_type.startswith("gemma"):
        return
    raise UnsupportedAdapter(
        f'tensor "{name}" adapts the table "{site.path}", which is not one of plain token embeddings: not served. '
        "Leave it out of target_modules.",
        tensor=name,
    )


def _drawn(length: int, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=(length, rank, rank), generator=generator)


def _read_tying(ledger: ConfigLedger) -> float:
    tying = ledger.use_number("weight_tying", 0.0)
    if 0.0 <= tying <= 1.0:
        return tying
    raise MalformedAdapter(
        f'field "weight_tying" = {tying}; expected a number from 0 to 1. Correct adapter_config.json.',
        field="weight_tying",
        value=tying,
    )
