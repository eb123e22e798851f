"""Which decoder reads which kind, and the two doors to all of them.

    check   config + header         -> report            no data is read: refuses before a download or an upload ends
    decode  config + header + data  -> forms and report  the same decisions, then the numbers

Everything that an adapter brings is used, known to be irrelevant, or named in a refusal. How the forms are packed and
where they live is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from peft_core.forms import AdapterForms
from peft_core.methods.adapterhub import adapter as adapterhub
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.in_place import beft, boft, ia3, ln_tuning, lokr, oft, road
from peft_core.methods.kinds import kind_of, refuse_kind
from peft_core.methods.lora import lora, trainable_tokens
from peft_core.methods.low_rank import (
    adalora,
    deft,
    delora,
    gralora,
    hra,
    loha,
    miss,
    osf,
    peanut,
    poly,
    psoft,
    tinylora,
    unilora,
    vblora,
    vera,
)
from peft_core.methods.prompt import prefix_tuning, prompt_tuning
from peft_core.methods.report import Decoded, DecodeReport
from peft_core.methods.tensors import Header, TensorSource
from peft_core.methods.whole_matrix import c3a, fourierft, frod, glora, hira, randlora, shira, supertuning, waveft
from peft_core.methods.whole_matrix.dense import MAX_DENSE_BYTES, require_dense_fits
from peft_core.spec import BaseModelSpec


class Plan(Protocol):
    """All decisions about one adapter; `read` only turns tensors into forms."""

    @property
    def report(self) -> DecodeReport: ...

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms: ...


Planner = Callable[[Mapping[str, Any], Header, BaseModelSpec], Plan]

_PLANNERS: Mapping[str, Planner] = {
    adalora.KIND: adalora.plan_adalora,
    adapterhub.KIND: adapterhub.plan_adapterhub,
    beft.KIND: beft.plan_beft,
    boft.KIND: boft.plan_boft,
    c3a.KIND: c3a.plan_c3a,
    deft.KIND: deft.plan_deft,
    delora.KIND: delora.plan_delora,
    fourierft.KIND: fourierft.plan_fourierft,
    frod.KIND: frod.plan_frod,
    glora.KIND: glora.plan_glora,
    gralora.KIND: gralora.plan_gralora,
    hira.KIND: hira.plan_hira,
    hra.KIND: hra.plan_hra,
    ia3.KIND: ia3.plan_ia3,
    ln_tuning.KIND: ln_tuning.plan_ln_tuning,
    loha.KIND: loha.plan_loha,
    lokr.KIND: lokr.plan_lokr,
    lora.KIND: lora.plan_lora,
    miss.KIND: miss.plan_miss,
    miss.KIND_BONE: miss.plan_bone,
    oft.KIND: oft.plan_oft,
    osf.KIND: osf.plan_osf,
    peanut.KIND: peanut.plan_peanut,
    poly.KIND: poly.plan_poly,
    prefix_tuning.CARTRIDGE_KIND: prefix_tuning.plan_cartridge,
    prefix_tuning.KIND: prefix_tuning.plan_prefix_tuning,
    prompt_tuning.CPT_KIND: prompt_tuning.plan_cpt,
    prompt_tuning.KIND: prompt_tuning.plan_prompt_tuning,
    prompt_tuning.MULTITASK_KIND: prompt_tuning.plan_multitask_prompt_tuning,
    prompt_tuning.P_TUNING_KIND: prompt_tuning.plan_p_tuning,
    psoft.KIND: psoft.plan_psoft,
    randlora.KIND: randlora.plan_randlora,
    road.KIND: road.plan_road,
    shira.KIND: shira.plan_shira,
    supertuning.KIND: supertuning.plan_supertuning,
    tinylora.KIND: tinylora.plan_tinylora,
    trainable_tokens.KIND: trainable_tokens.plan_trainable_tokens,
    unilora.KIND: unilora.plan_unilora,
    vblora.KIND: vblora.plan_vblora,
    vera.KIND: vera.plan_vera,
    vera.KIND_PVERA: vera.plan_pvera,
    waveft.KIND: waveft.plan_waveft,
}
SERVED_KINDS = tuple(sorted(_PLANNERS))


def check(
    config: Mapping[str, Any], header: Header, spec: BaseModelSpec, *, max_dense_bytes: int = MAX_DENSE_BYTES
) -> DecodeReport:
    """Decide from names and shapes whether an adapter can be served on a base, and how.

    Args:
        config: adapter_config.json, its objects in the order of the file (patterns depend on it).
        header: name -> dtype and shape of every tensor in the file.
        max_dense_bytes: what one adapter's whole matrices may take, see `peft_core.methods.whole_matrix.dense`.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    return _plan(config, header, spec, max_dense_bytes).report


def decode(
    config: Mapping[str, Any],
    tensors: TensorSource,
    spec: BaseModelSpec,
    base: BaseWeights | None = None,
    *,
    max_dense_bytes: int = MAX_DENSE_BYTES,
) -> Decoded:
    """Turn an adapter into forms: float32, on the host, scalings folded in.

    Args:
        base: the base's weights; kinds whose report says `needs_base` cannot be decoded without them.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: as `check`, and for values that are NaN or infinite.
    """
    plan = _plan(config, tensors.header, spec, max_dense_bytes)
    return Decoded(plan.read(tensors, base), plan.report)


def _plan(config: Mapping[str, Any], header: Header, spec: BaseModelSpec, max_dense_bytes: int) -> Plan:
    kind = kind_of(config)
    if kind not in _PLANNERS:
        refuse_kind(kind, SERVED_KINDS)
    plan = _PLANNERS[kind](config, header, spec)
    require_dense_fits(plan.report, max_dense_bytes)
    return plan
