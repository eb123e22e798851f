"""VeRA (https://arxiv.org/abs/2310.11454) and PVeRA: one pair of random matrices for all modules, two vectors for each.

    base_model.vera_A                        [r, largest in_features]     frozen; perhaps not stored
    base_model.vera_B                        [largest out_features, r]    frozen; perhaps not stored
    base_model.model.<path>.vera_lambda_d    [r]
    base_model.model.<path>.vera_lambda_b    [out_features]

    Semantics, a module takes the first columns of vera_A and the first rows of vera_B:
        y += lambda_b * (vera_B (lambda_d * (vera_A x)))

With save_projection=False the two matrices are drawn again, as PEFT draws them: one generator on the CPU, vera_A first,
uniform within sqrt(6 / columns), as large as the largest module that the config targets.

PVeRA (probabilistic) has 2 r rows in pvera_A and lambda_d: means, then log variances of a noise that training adds. At
inference only the means count, unless sample_at_inference asks for noise, which is refused.

Running example: r = 256 on q_proj 4096 x 4096
    LinearDelta(down=lambda_d[:, None] * vera_A[:, :4096], up=lambda_b[:, None] * vera_B[:4096])
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peft_core.errors import BaseMismatch, MalformedAdapter
from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import require_targets, whole_number
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import TunerFile, require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "VERA"
KIND_PVERA = "PVERA"
_DEFAULT_RANK = 256
_DROPOUT = "dropout is off at inference"
_IRRELEVANT: Mapping[str, str] = {
    "d_initial": "only says how training began",
    "pvera_dropout": _DROPOUT,
    "vera_dropout": _DROPOUT,
}
_REGENERATED = (
    "The random matrices are not in the file and are drawn again from projection_prng_key, as PEFT draws them on a CPU."
)


@dataclass(frozen=True, slots=True)
class _Dialect:
    """What VeRA and PVeRA spell differently."""

    kind: str
    prefix: str  # of every tensor
    rows: int  # of lambda_d and A for each rank


_VERA = _Dialect(KIND, "vera", 1)
_PVERA = _Dialect(KIND_PVERA, "pvera", 2)


@dataclass(frozen=True, slots=True)
class _Projection:
    """How to draw the two matrices where they were not stored."""

    key: int
    down_shape: tuple[int, int]
    up_shape: tuple[int, int]

    @classmethod
    def of(cls, rows: int, rank: int, key: int, targets: Collection[str], spec: BaseModelSpec) -> _Projection:
        sites = [spec.sites[path] for path in targets]
        columns, outputs = max(site.in_features for site in sites), max(site.out_features for site in sites)
        return cls(key, (rows * rank, columns), (outputs, rank))

    def draw(self) -> list[torch.Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(self.key)
        return [_drawn(shape, generator) for shape in (self.down_shape, self.up_shape)]


def plan_vera(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a VeRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    return _plan(_VERA, ConfigLedger(config), header, spec)


def plan_pvera(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """As `plan_vera`."""
    ledger = ConfigLedger(config)
    if ledger.use_flag("sample_at_inference"):
        refuse(
            "sample_at_inference",
            True,
            "the same request would be answered differently each time. Set it to false: the means are then served.",
        )
    ledger.set_aside({"generator_seed": "only of the noise that sample_at_inference adds"})
    return _plan(_PVERA, ledger, header, spec)


def _plan(dialect: _Dialect, ledger: ConfigLedger, header: Header, spec: BaseModelSpec) -> TunerPlan:
    tuner = read_tuner_config(ledger, biases=("all", f"{dialect.prefix}_only"))
    rank = ledger.use_count("r") or _DEFAULT_RANK
    key = whole_number(ledger, "projection_prng_key", 0)
    is_stored = ledger.use_flag("save_projection", default=True)
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.set_aside(_IRRELEVANT)
    ledger.close()
    vectors = (f"{dialect.prefix}_lambda_d", f"{dialect.prefix}_lambda_b")
    matrices = (f"{dialect.prefix}_A", f"{dialect.prefix}_B")
    file = sort_tuner_file(header, spec, suffixes=vectors, shared=matrices)
    _require_both_or_none(file, matrices, is_stored)
    projection = None if file.shared else _Projection.of(dialect.rows, rank, key, require_targets(tuner, spec), spec)
    down_shape, up_shape = _stored_shapes(dialect.rows, rank, file, matrices, header)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, vectors)
        shape_of(header, names[vectors[0]], site, (dialect.rows * rank,))
        shape_of(header, names[vectors[1]], site, ["out"])
        if file.shared and (down_shape[1] < site.in_features or up_shape[0] < site.out_features):
            raise _too_small(site, file.shared[matrices[0]], down_shape, up_shape)
        return MatchedSite(site.path, rank, 1.0)

    def prepare(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        drawn = projection.draw() if projection is not None else [stored[name] for name in matrices]
        return {"A": drawn[0][:rank], "B": drawn[1]}

    def formula(data: SiteData) -> LinearDelta:
        site, gain_down, gain_up = data.site, data.own[vectors[0]], data.own[vectors[1]]
        down = gain_down[:rank, None] * data.shared["A"][:, : site.in_features]
        return LinearDelta(down=down, up=gain_up[:, None] * data.shared["B"][: site.out_features])

    warnings = () if file.shared else (_REGENERATED,)
    draft = TunerDraft(dialect.kind, tuner, file, header, spec, ledger.irrelevant, starts_random, warnings)
    return draft.plan(match, formula, prepare=prepare)


def _require_both_or_none(file: TunerFile, matrices: tuple[str, str], is_stored: bool) -> None:
    lacking = [name for name in matrices if name not in file.shared]
    if lacking and (file.shared or is_stored):
        raise MalformedAdapter(
            f'tensor "base_model.{lacking[0]}" is missing, but the config says that the random matrices are stored '
            "(save_projection), or the other one is. Save the adapter again.",
            field="save_projection",
            value=is_stored,
        )


def _stored_shapes(
    rows: int, rank: int, file: TunerFile, matrices: tuple[str, str], header: Header
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not file.shared:
        return (0, 0), (0, 0)
    down = shape_of(header, file.shared[matrices[0]], None, (rows * rank, None))
    return down, shape_of(header, file.shared[matrices[1]], None, (None, rank))


def _too_small(site: Site, name: str, down: tuple[int, ...], up: tuple[int, ...]) -> BaseMismatch:
    return BaseMismatch(
        f'tensor "{name}" and its pair serve modules of up to {down[1]} inputs and {up[0]} outputs; "{site.path}" of '
        f"this base has {site.in_features} and {site.out_features}. Use the base that the adapter was trained on.",
        tensor=name,
    )


def _drawn(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
