"""RandLoRA (https://arxiv.org/abs/2502.00987): a sum of random low-rank matrices with trained scales, of full rank.

    base_model.model.<path>.randlora_lambda     [r, bases]
    base_model.model.<path>.randlora_gamma      [bases, the smaller side]
    base_model.randlora_A                       [r, 1, smallest side of all]        random, shared by all modules
    base_model.randlora_B                       [largest side of all, bases, r]     random, shared by all modules

    Semantics, with bases = the smaller side / r, rounded up:
        small[j, k] = randlora_lambda[j, k] * randlora_A[j, 0] * randlora_gamma[k]     as r * bases rows, j first
        large[:, k, j] = randlora_B[:, k, j]                                           as bases * r columns, k first
        y += scaling * large small x,   scaling = randlora_alpha / r     (small^T large^T where the outputs are fewer)

The product has full rank and is kept as a whole matrix. Where save_projection is false the random matrices are drawn
again from projection_prng_key, in the sizes that the targeted modules need, and in bfloat16, as PEFT does on every
machine that knows it. PEFT also stores copies of them under every module; they change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from peft_core.errors import UnsupportedAdapter
from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import require_targets
from peft_core.methods.tuner.config import TunerConfig, read_tuner_config
from peft_core.methods.tuner.file import TunerFile, require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import Side, shape_of
from peft_core.methods.whole_matrix.spectrum import MAX_SEED
from peft_core.spec import BaseModelSpec, Site

KIND = "RANDLORA"
_SCALES, _BASE_SCALES = "randlora_lambda", "randlora_gamma"
_SMALL, _LARGE = "randlora_A", "randlora_B"
_DEFAULT_RANK = 32
_DEFAULT_ALPHA = 640
_DRAWN_AGAIN = (
    "The random matrices are not stored and were drawn again in bfloat16. PEFT draws others on a machine that does not "
    "know bfloat16; if it was trained on one, save it with save_projection=True."
)


class _Projection(NamedTuple):
    """How the random matrices were drawn."""

    key: int
    rank: int
    largest: int  # of the sides, over all targeted modules
    smallest: int
    sparsity: float | None  # None: dense

    def drawn(self) -> dict[str, torch.Tensor]:
        """Both matrices, from the generator of PEFT's own recipe: the small one first."""
        generator = torch.Generator().manual_seed(self.key)
        num_bases = math.ceil(self.smallest / self.rank)
        if self.sparsity is not None:
            small = torch.rand((self.rank, 1, self.smallest), generator=generator)
            large = torch.rand((self.largest, num_bases, self.rank), generator=generator)
            return {_SMALL: _signs(small, self.sparsity), _LARGE: _signs(large, self.sparsity)}
        small = _uniform((self.rank, 1, self.smallest), generator)
        parts = [_uniform((self.largest, 1, self.rank), generator) for _ in range(num_bases)]
        large = torch.cat(parts, dim=1)
        return {_SMALL: (small / small.std()).float(), _LARGE: (large / large.std()).float()}


def plan_randlora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a RandLoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "randlora_only"))
    starts_random = not ledger.use_flag("init_weights", True)
    rank = ledger.use_count("r") or _DEFAULT_RANK
    scaling = ledger.use_number("randlora_alpha", _DEFAULT_ALPHA) / rank
    ledger.set_aside({"randlora_dropout": "dropout is off at inference"})
    is_stored = ledger.use_flag("save_projection", True)
    key = ledger.use_size("projection_prng_key") or 0
    if key >= MAX_SEED:
        refuse("projection_prng_key", key, "it is no seed of 64 bits. Correct adapter_config.json.")
    is_sparse, is_very_sparse = ledger.use_flag("sparse"), ledger.use_flag("very_sparse")
    ledger.close()
    file = sort_tuner_file(
        header, spec, suffixes=(_SCALES, _BASE_SCALES), shared=(_SMALL, _LARGE), irrelevant=(_SMALL, _LARGE)
    )
    _require_projection(file, is_stored)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, (_SCALES, _BASE_SCALES))
        side: Side = "in" if site.in_features <= site.out_features else "out"
        num_bases = math.ceil(min(site.in_features, site.out_features) / rank)
        shape_of(header, names[_SCALES], site, (rank, num_bases))
        shape_of(header, names[_BASE_SCALES], site, (num_bases, side))
        return MatchedSite(site.path, 0, scaling)

    warnings = () if is_stored else (_DRAWN_AGAIN,)
    draft = TunerDraft(
        KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random, warnings=warnings
    )
    if is_stored:
        plan = draft.plan(match, _update)
        _require_large_enough(file, header, plan, rank)
        return plan
    largest, smallest = _sides(tuner, spec)
    sparsity = math.sqrt(smallest) if is_very_sparse else 3.0 if is_sparse else None
    projection = _Projection(key, rank, largest, smallest, sparsity)
    return draft.plan(match, _update, prepare=lambda _: projection.drawn())


def _update(data: SiteData) -> SiteChange:
    scales, base_scales, site = data.own[_SCALES], data.own[_BASE_SCALES], data.site
    largest, smallest = max(site.in_features, site.out_features), min(site.in_features, site.out_features)
    num_bases = scales.shape[1]
    small = scales[:, :, None] * data.shared[_SMALL][:, :, :smallest] * base_scales[None]
    large = data.shared[_LARGE][:largest, :num_bases, :]
    dense = large.flatten(1) @ small.flatten(0, 1) * data.matched.scaling  # [larger side, smaller side]
    return SiteChange(dense=dense if site.in_features == smallest else dense.T.contiguous())


def _require_projection(file: TunerFile, is_stored: bool) -> None:
    missing = [name for name in (_SMALL, _LARGE) if name not in file.shared]
    if is_stored and missing:
        raise UnsupportedAdapter(
            f"the config says that the random matrices are stored, but base_model.{missing[0]} is not in the file. "
            "Save the adapter again, or set save_projection to false if it was trained that way.",
            field="save_projection",
            value=True,
        )
    if not is_stored and len(missing) < 2:
        raise UnsupportedAdapter(
            "the file has stored random matrices, which PEFT would not use because the config says save_projection = "
            "false. Set it to true, or remove them.",
            field="save_projection",
            value=False,
        )


def _require_large_enough(file: TunerFile, header: Header, plan: TunerPlan, rank: int) -> None:
    sites = [plan.spec.sites[site.path] for site in plan.report.sites]
    largest = max(max(site.in_features, site.out_features) for site in sites)
    smallest = max(min(site.in_features, site.out_features) for site in sites)
    num_bases = math.ceil(smallest / rank)
    small, large = file.shared[_SMALL], file.shared[_LARGE]
    sizes = shape_of(header, small, None, (rank, 1, None)), shape_of(header, large, None, (None, None, rank))
    if sizes[0][2] < smallest or sizes[1][0] < largest or sizes[1][1] < num_bases:
        raise UnsupportedAdapter(
            f'tensor "{small}" has shape {list(sizes[0])} and "{large}" {list(sizes[1])}; the modules of this adapter '
            f"need sides of {smallest} and {largest} and {num_bases} bases. Save the adapter again.",
            tensor=small,
        )


def _sides(tuner: TunerConfig, spec: BaseModelSpec) -> tuple[int, int]:
    """The larger and the smaller of the most outputs and the most inputs that a targeted module has."""
    sites = [spec.sites[path] for path in require_targets(tuner, spec)]
    most = max(site.out_features for site in sites), max(site.in_features for site in sites)
    return max(most), min(most)


def _uniform(shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Kaiming's uniform distribution with a = sqrt(5), as PyTorch draws it in bfloat16."""
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _signs(uniform: torch.Tensor, sparsity: float) -> torch.Tensor:
    """-1, 0 and 1 with a standard deviation of 1."""
    edge = 1 / (2 * sparsity)
    signs = (uniform > 1 - edge).float() - (uniform < edge).float()
    return signs / signs.std()
