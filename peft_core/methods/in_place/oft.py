"""OFT (https://arxiv.org/abs/2306.07280, https://arxiv.org/abs/2506.19847): the input rotated, block by block.

    base_model.model.<path>.oft_R.weight     [blocks, size * (size - 1) / 2], or one block for all (block_share)

    Semantics, for each block of `size` inputs:
        y = base(x'),   x'[block] = x[block] @ R[block]
        R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4           use_cayley_neumann (the default), five terms
        R = (I - Q) (I + Q)^-1                      otherwise: it turns the other way

    Q is the skew matrix with the stored numbers above its diagonal; with `coft` first scaled down to a norm of
    eps / sqrt(blocks).

Running example: oft_block_size 32 at a module with 64 inputs
    oft_R.weight [2, 496]     rotation [2, 32, 32]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_core.errors import MalformedAdapter
from peft_core.forms import SiteChange
from peft_core.methods.in_place.rotations import cayley, cayley_neumann, shortened, skew_from_upper
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.refusals import contradiction, refuse_conv1d, refuse_embeddings
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "OFT"
_SUFFIX = "oft_R.weight"
_DEFAULT_TERMS = 5
_MAX_TERMS = 64
_DEFAULT_LIMIT = 6e-5
_SERIES_SINCE = (0, 18)  # version of PEFT


@dataclass(frozen=True, slots=True)
class _Rotation:
    is_series: bool
    num_terms: int
    norm_limit: float | None  # before it is divided by the root of the number of blocks
    is_shared: bool
    num_blocks: int  # 0: the size decides
    size: int  # 0: the number decides

    def size_at(self, site: Site) -> int:
        """The size of a block that PEFT makes of the config: the divisor of the inputs nearest to what it says."""
        wanted, total = self.size or self.num_blocks, site.in_features
        if total % wanted == 0:
            return self.size or total // wanted
        divisors = [number for number in range(1, total + 1) if total % number == 0]
        nearest = min(divisors, key=lambda number: (abs(number - wanted), number))
        return nearest if self.size else total // nearest

    def matrices(self, data: SiteData) -> SiteChange:
        upper = data.own[_SUFFIX]
        size = _size_of(upper.shape[1])
        skew = skew_from_upper(upper, size)
        if self.norm_limit is not None:
            skew = shortened(skew, self.norm_limit / math.sqrt(skew.shape[0]))
        rotation = cayley_neumann(skew, self.num_terms) if self.is_series else cayley(skew)
        num_blocks = data.site.in_features // size
        return SiteChange(rotation=rotation.expand(num_blocks, size, size).contiguous())


def plan_oft(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about an OFT adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "oft_only"))
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.set_aside({"module_dropout": "dropout is off at inference"})
    rotation = _read_rotation(ledger)
    ledger.close()
    refuse_embeddings(header, "oft_embedding_R", KIND)
    file = sort_tuner_file(header, spec, suffixes=(_SUFFIX,))

    def match(site: Site, names: Names) -> MatchedSite:
        refuse_conv1d(site, names, KIND)
        name = names[_SUFFIX]
        _, num_values = shape_of(header, name, site, (None, None))
        size = _size_of(num_values)
        if size * (size - 1) // 2 != num_values:
            raise MalformedAdapter(
                f'tensor "{name}" has {num_values} values a block, which no skew matrix has. Save the adapter again.',
                tensor=name,
            )
        if size != rotation.size_at(site):
            field, value = ("oft_block_size", rotation.size) if rotation.size else ("r", rotation.num_blocks)
            raise contradiction(name, f"has {num_values} values a block, which is a size of {size}", field, value)
        shape_of(header, name, site, (1 if rotation.is_shared else ("in", size), num_values))
        return MatchedSite(site.path, 0, 1.0)

    draft = TunerDraft(
        KIND,
        tuner,
        file,
        header,
        spec,
        ledger.irrelevant,
        starts_random=starts_random,
        warnings=_warnings(rotation, config.get("peft_version")),
        rankless_forms=("rotation",),
    )
    return draft.plan(match, rotation.matrices)


def _read_rotation(ledger: ConfigLedger) -> _Rotation:
    num_blocks, size = ledger.use_size("r") or 0, ledger.use_size("oft_block_size")
    if size is None:
        refuse(
            "oft_block_size",
            None,
            "adapters without it are of PEFT before 0.14, where OFT was another method. Train it with a current PEFT.",
        )
    if bool(num_blocks) == bool(size):
        raise MalformedAdapter(
            f'field "r" = {num_blocks} and field "oft_block_size" = {size}: one of them decides, and the other must be '
            "0. Correct adapter_config.json.",
            field="r",
            value=num_blocks,
        )
    num_terms = ledger.use_count("num_cayley_neumann_terms") or _DEFAULT_TERMS
    if num_terms > _MAX_TERMS:
        refuse("num_cayley_neumann_terms", num_terms, f"at most {_MAX_TERMS} are computed. Train with fewer.")
    limit = ledger.use_number("eps", _DEFAULT_LIMIT)
    return _Rotation(
        is_series=ledger.use_flag("use_cayley_neumann", True),
        num_terms=num_terms,
        norm_limit=limit if ledger.use_flag("coft") else None,
        is_shared=ledger.use_flag("block_share"),
        num_blocks=num_blocks,
        size=size,
    )


def _warnings(rotation: _Rotation, version: object) -> tuple[str, ...]:
    """PEFT stores its version since 0.18, which changed the series."""
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    is_current = found is not None and (int(found[1]), int(found[2])) >= _SERIES_SINCE
    if is_current or not rotation.is_series:
        return ()
    sentence = (
        "The adapter was saved by PEFT before 0.18, whose series for the rotation was slightly another; it is read as "
        "a current PEFT reads it."
    )
    return (sentence,)


def _size_of(num_values: int) -> int:
    """The size of a skew matrix with so many numbers above its diagonal."""
    return (1 + math.isqrt(1 + 8 * num_values)) // 2
