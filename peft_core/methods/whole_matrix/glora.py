"""GLoRA (https://arxiv.org/abs/2306.07967): the weight scaled entry by entry and added to, the bias as well.

    base_model.model.<path>.glora_<A|B|C|D|E>.<Xd, Xu | X | zeros>
        A, B     "lora" Xd [out, r] Xu [r, in]     "vector" X [out, 1]     "constant" X [1]     "none" zeros [out, in]
        C        "lora" Xd [in, r] Xu [r, 1]       "vector" X [in, 1]                           "none" zeros [in, 1]
        D, E                                       "vector" X [out]        "constant" X [1]     "none" zeros [out]

    Semantics, a pair Xd, Xu standing for its product, * entry by entry:
        y = (W + W * A + B) x + bias + bias * D + E + W C        C, D and E only at modules that have a bias

With "lora" W * A + B is kept as a whole matrix. Otherwise A is a factor of each output and B has rank 1.

Running example: config_A_B "vector" at a module without bias
    gain = 1 + A [out],   LinearDelta(down=ones [1, in], up=B [out, 1])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import LinearDelta, SiteChange
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.refusals import refuse_conv1d
from peft_core.methods.report import FormName, MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import Dimension, shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "GLORA"
_DEFAULT_RANK = 8
_Shapes = Mapping[str, tuple[Dimension, ...]]  # by what follows the letter


def plan_glora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a GLoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    starts_random = not ledger.use_flag("init_weights", True)
    rank = ledger.use_count("r") or _DEFAULT_RANK
    of_weight = _read_choice(ledger, "config_A_B", "lora", ("lora", "vector", "constant", "none"))
    of_product = _read_choice(ledger, "config_C", "lora", ("lora", "vector", "none"))
    of_bias = _read_choice(ledger, "config_D_E", "constant", ("vector", "constant", "none"))
    ledger.close()
    suffixes = [f"glora_{letter}.{part}" for letter in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")]
    file = sort_tuner_file(header, spec, suffixes=suffixes)

    def match(site: Site, names: Names) -> MatchedSite | None:
        refuse_conv1d(site, names, KIND)
        weight = _shapes(of_weight, rank, ("out", "in"))
        product = _shapes(of_product if site.has_bias else "none", rank, ("in", 1))
        bias = _shapes(of_bias if site.has_bias else "none", rank, ("out",))
        for letter, shapes in zip("ABCDE", (weight, weight, product, bias, bias), strict=True):
            require_all(names, site.path, [f"glora_{letter}.{part}" for part in shapes])
            for part, dimensions in shapes.items():
                shape_of(header, names[f"glora_{letter}.{part}"], site, dimensions)
        if of_weight == "none" and (not site.has_bias or of_product == of_bias == "none"):
            return None
        return MatchedSite(site.path, 1 if of_weight in ("vector", "constant") else 0, 1.0)

    has_bias = any(spec.sites[path].has_bias for path in file.modules if path in spec.sites)
    is_dense = of_weight == "lora"
    bias_forms: tuple[FormName, ...] = ("shift",) if has_bias else ()
    draft = TunerDraft(
        KIND,
        tuner,
        file,
        header,
        spec,
        ledger.irrelevant,
        starts_random=starts_random,
        forms=("gain", "low rank", *bias_forms),
        rankless_forms=("dense", *bias_forms) if is_dense else bias_forms,
    )
    return draft.plan(match, _change, needs_base=is_dense or has_bias)


def _change(data: SiteData) -> SiteChange | tuple[SiteChange, LinearDelta]:
    site = data.site
    _require_zeros(data)
    scale, addition = _value(data, "A"), _value(data, "B")
    gain = None if scale is None or scale.shape == (site.out_features, site.in_features) else 1 + scale.flatten()
    shift = _shift(data, gain) if site.has_bias else None
    if scale is None or addition is None:
        return SiteChange(shift=shift)
    if gain is None:
        return SiteChange(dense=data.weight() * scale + addition, shift=shift)
    up = addition.reshape(-1, 1).expand(site.out_features, 1)
    change = SiteChange(gain=gain.expand(site.out_features).contiguous(), shift=shift)
    return change, LinearDelta(down=torch.ones(1, site.in_features), up=up.contiguous())


def _shift(data: SiteData, gain: torch.Tensor | None) -> torch.Tensor:
    """What the new bias is more than the old one times the gain."""
    bias = data.bias()
    shift = torch.zeros_like(bias) if gain is None else (1 - gain) * bias
    product, scale, addition = (_value(data, letter) for letter in "CDE")
    if product is not None:
        shift = shift + (data.weight() @ product).squeeze(-1)
    shift = shift if scale is None else shift + bias * scale
    return shift if addition is None else shift + addition


def _value(data: SiteData, letter: str) -> torch.Tensor | None:
    """One of the five; None where it is none."""
    own, name = data.own, f"glora_{letter}"
    if f"{name}.Xd" in own:
        return own[f"{name}.Xd"] @ own[f"{name}.Xu"]
    return own.get(f"{name}.X")


def _require_zeros(data: SiteData) -> None:
    for suffix, values in data.own.items():
        if suffix.endswith(".zeros") and bool(values.any()):
            raise MalformedAdapter(
                f'{suffix} of "{data.site.path}" holds values that are not 0, though the config says that there are '
                "none. The file is damaged or was written by another tool; save the adapter again.",
                tensor=suffix,
            )


def _shapes(choice: str, rank: int, whole: tuple[Dimension, ...]) -> _Shapes:
    if choice == "lora":
        return {"Xd": (whole[0], rank), "Xu": (rank, whole[1])}
    if choice == "vector":
        return {"X": whole if len(whole) == 1 else (whole[0], 1)}
    return {"X": (1,)} if choice == "constant" else {"zeros": whole}


def _read_choice(ledger: ConfigLedger, field: str, default: str, known: tuple[str, ...]) -> str:
    choice = ledger.use(field, default)
    if choice not in known:
        refuse(field, choice, f"known are {', '.join(known)}. Correct adapter_config.json.")
    return str(choice)
