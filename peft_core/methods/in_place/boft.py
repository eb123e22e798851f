"""BOFT (https://arxiv.org/abs/2311.06243): the input rotated by butterfly factors, and the weight's rows scaled.

    base_model.model.<path>.boft_R     [factors, blocks, size, size]
    base_model.model.<path>.boft_s     [out_features, 1]

    Semantics:
        y = boft_s * (W x') + bias,   x' = x @ R        the bias is not scaled
        R = the product of the factors, each the Cayley transform of (boft_R - boft_R^T) / 2

The file decides how many factors there are: without PEFT's CUDA extension training uses one, whatever the config says.

Running example: boft_block_size 4, two factors at a module with 64 inputs
    boft_R [2, 16, 4, 4]     rotation [8, 8, 8], gain = boft_s, shift = (1 - boft_s) * bias
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_core.errors import MalformedAdapter
from peft_core.forms import SiteChange
from peft_core.methods.in_place.rotations import butterfly, cayley, skew_part
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.refusals import contradiction, refuse_conv1d, require_whole_blocks
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config, some
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "BOFT"
_FACTORS, _SCALES = "boft_R", "boft_s"
_DEFAULT_SIZE = 4


def plan_boft(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a BOFT adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "boft_only"))
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.set_aside({"boft_dropout": "dropout is off at inference"})
    num_blocks = ledger.use_size("boft_block_num") or 0
    size = ledger.use_size("boft_block_size")
    size = (0 if num_blocks else _DEFAULT_SIZE) if size is None else size
    stated_factors = ledger.use_count("boft_n_butterfly_factor") or 1
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_FACTORS, _SCALES))

    def match(site: Site, names: Names) -> MatchedSite:
        refuse_conv1d(site, names, KIND)
        require_all(names, site.path, (_FACTORS, _SCALES))
        name = names[_FACTORS]
        factors, blocks, rows, _ = shape_of(header, name, site, (None, None, None, None))
        shape_of(header, name, site, (factors, ("in", rows), rows, rows))
        require_whole_blocks(site, name, rows, "in")
        shape_of(header, names[_SCALES], site, ("out", 1))
        if size and size != rows:
            raise contradiction(name, f"has blocks of size {rows}", "boft_block_size", size)
        if num_blocks and num_blocks != blocks:
            raise contradiction(name, f"has {blocks} blocks", "boft_block_num", num_blocks)
        if factors not in (1, stated_factors):
            raise contradiction(name, f"has {factors} factors", "boft_n_butterfly_factor", stated_factors)
        _require_factors(site, name, factors, blocks, rows)
        return MatchedSite(site.path, 0, 1.0)

    has_bias = any(spec.sites[path].has_bias for path in file.modules if path in spec.sites)
    single = [path for path, names in file.modules.items() if _is_single(names, header)]
    draft = TunerDraft(
        KIND,
        tuner,
        file,
        header,
        spec,
        ledger.irrelevant,
        starts_random=starts_random,
        warnings=_warnings(single if stated_factors > 1 else []),
        rankless_forms=("rotation", "gain", "shift") if has_bias else ("rotation", "gain"),
    )
    return draft.plan(match, _change, needs_base=has_bias)


def _change(data: SiteData) -> SiteChange:
    stored, gain = data.own[_FACTORS], data.own[_SCALES].flatten()
    factors = cayley(skew_part(stored.flatten(0, 1))).unflatten(0, stored.shape[:2])
    shift = (1 - gain) * data.bias() if data.site.has_bias else None
    return SiteChange(rotation=butterfly(factors), gain=gain, shift=shift)


def _require_factors(site: Site, name: str, factors: int, blocks: int, size: int) -> None:
    spread = 2 ** min(factors - 1, 62)
    if factors == 1 or (size % 2 == 0 and blocks % spread == 0):
        return
    raise MalformedAdapter(
        f'tensor "{name}" has {factors} butterfly factors of {blocks} blocks of size {size}; {factors} factors need '
        f'blocks of an even size and a multiple of {spread} of them at "{site.path}". Save the adapter again.',
        tensor=name,
    )


def _warnings(single: list[str]) -> tuple[str, ...]:
    if not single:
        return ()
    sentence = (
        f"The config asks for several butterfly factors, but the file has one at {some(single)}: trained without "
        "PEFT's CUDA extension, which then uses one. The file decides."
    )
    return (sentence,)


def _is_single(names: Names, header: Header) -> bool:
    return _FACTORS in names and tuple(header[names[_FACTORS]].shape[:1]) == (1,)
