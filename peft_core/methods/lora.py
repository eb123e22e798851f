"""LoRA (https://arxiv.org/abs/2106.09685): a low-rank addition to linear modules.

    base_model.model.<path>.lora_A.weight   [rank, in_features]
    base_model.model.<path>.lora_B.weight   [out_features, rank]

    Semantics:
        y += scaling * lora_B (lora_A x),   scaling = alpha / rank  or  alpha / sqrt(rank)

The file decides which modules are adapted and with which rank; the config decides the scaling, and must agree with
the file. A fused projection (`qkv_proj`, `c_attn`) is one site like any other, and the factors have this orientation
for `Conv1D` too. Knows nothing of engines: how many adapters, which rows, which device.

Running example: r = 4, lora_alpha = 8 on `model.layers.0.self_attn.q_proj` of a base with hidden size 64
    LinearDelta(down=lora_A [4, 64], up=2.0 * lora_B [64, 4])
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter, shown
from peft_core.forms import AdapterForms, LinearDelta
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.lora_config import LoraConfig, read_lora_config
from peft_core.methods.lora_tensors import Factors, sort_tensors
from peft_core.methods.report import DecodeReport, MatchedSite
from peft_core.methods.targets import targeted_sites
from peft_core.methods.tensors import Header, TensorSource, read_finite, require_finite, require_matrix
from peft_core.spec import BaseModelSpec, Site

KIND = "LORA"
_MAX_NAMED = 5  # of many modules, as many are named in a sentence


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """All decisions about one adapter, made without reading a tensor."""

    report: DecodeReport
    factors: Mapping[str, Factors]  # by path, as `report.sites`

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """Read the factors and fold the scaling into the up side; float32 throughout.

        Raises:
            MalformedAdapter: a tensor holds NaN or infinity, or is not what the header announced.
        """
        linear: dict[str, LinearDelta] = {}
        for site in self.report.sites:
            names = self.factors[site.path]
            down = read_finite(tensors, names.down)
            up = read_finite(tensors, names.up) * site.scaling
            require_finite(up, names.up)
            linear[site.path] = LinearDelta(down=down, up=up)
        return AdapterForms(linear=linear)


def plan_lora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> LoraPlan:
    """Decide everything about a LoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    lora = read_lora_config(ledger)
    tensors = sort_tensors(header, spec)
    missing = _compare_targets(lora, tensors.factors, spec)
    sites = tuple(
        _match(spec.sites[path], tensors.factors[path], header, lora) for path in spec.sites if path in tensors.factors
    )
    report = DecodeReport(
        kind=KIND,
        sites=sites,
        num_parameters=sum(_num_parameters(spec.sites[site.path], site.rank) for site in sites),
        irrelevant_fields=ledger.irrelevant,
        irrelevant_tensors=tensors.irrelevant,
        warnings=tuple(_warnings(lora, sites, missing, spec)),
    )
    return LoraPlan(report, tensors.factors)


def _compare_targets(lora: LoraConfig, factors: Mapping[str, Factors], spec: BaseModelSpec) -> tuple[str, ...]:
    """Hold the file against the config; returns the modules that are targeted but have no tensors."""
    heads = [path for path in factors if spec.sites[path].kind == "head"]
    if lora.ties_head and heads:
        refuse(
            "ensure_weight_tying",
            True,
            f'an adapter on "{heads[0]}" that also changes the embedding is not served yet. '
            "Train with ensure_weight_tying=False, or without the head.",
        )
    if lora.rule is None:
        return ()
    targeted = targeted_sites(lora.rule, spec)
    extra = [path for path in factors if path not in targeted]
    if extra:
        name = factors[extra[0]].down
        raise UnsupportedAdapter(
            f'tensor "{name}" belongs to a module that the config does not target ({len(extra)} such modules). '
            "PEFT would drop it in silence. Correct target_modules, exclude_modules or layers_to_transform, "
            "or remove the tensors.",
            tensor=name,
        )
    missing = tuple(path for path in spec.sites if path in targeted and path not in factors)
    if missing and lora.starts_random:
        refuse(
            "init_lora_weights",
            False,
            f"the config targets {_some(missing)}, for which the file has no tensors, and says that untrained factors "
            "are random. Save the adapter again with all its tensors.",
        )
    return missing


def _match(site: Site, names: Factors, header: Header, lora: LoraConfig) -> MatchedSite:
    """Check one module's factors against the base and the config."""
    rank, num_inputs = require_matrix(header, names.down)
    num_outputs, up_rank = require_matrix(header, names.up)
    _require_size(site, names.down, [rank, num_inputs], [rank, site.in_features])
    _require_size(site, names.up, [num_outputs, up_rank], [site.out_features, up_rank])
    if up_rank != rank:
        raise MalformedAdapter(
            f'tensor "{names.up}" has rank {up_rank} (its columns), but "{names.down}" has rank {rank} (its rows). '
            "The file is damaged; save the adapter again.",
            tensor=names.up,
        )
    stated = lora.stated_rank(site.path)
    if stated is not None and stated != rank:
        raise MalformedAdapter(
            f'tensor "{names.down}" has rank {rank} (its rows), but the config says {shown(stated)} for this module, '
            "so its scaling is unclear. Correct r and rank_pattern; the first pattern that fits a module counts.",
            tensor=names.down,
        )
    return MatchedSite(site.path, rank, lora.scaling(site.path, rank))


def _require_size(site: Site, name: str, got: list[int], expected: list[int]) -> None:
    if got == expected:
        return
    raise BaseMismatch(
        f'tensor "{name}" has shape {got}; "{site.path}" of this base needs {expected}. '
        "Use the base that the adapter was trained on.",
        tensor=name,
    )


def _warnings(
    lora: LoraConfig, sites: tuple[MatchedSite, ...], missing: tuple[str, ...], spec: BaseModelSpec
) -> Iterable[str]:
    if _differ(lora.base_name, spec.name):
        yield (
            f'The adapter says that it was trained on "{lora.base_name}"; this base is "{spec.name}". '
            "Its tensors fit this base."
        )
    if lora.rule is None:
        yield "The config names no target_modules: every module with tensors in the file is adapted."
    if missing:
        yield f"The config targets {_some(missing)}, for which the file has no tensors: left as in the base."
    idle = lora.idle_patterns(tuple(site.path for site in sites))
    if idle:
        yield f"Entries of rank_pattern or alpha_pattern that decide for no module: {_some(idle)}."


def _differ(said: str | None, served: str | None) -> bool:
    """Whether two names of a base differ in more than owner, case, or the quantisation it was trained in."""
    if said is None or served is None:
        return False
    return _short(said) != _short(served)


def _short(name: str) -> str:
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"(-unsloth)?-bnb-4bit$|-(gptq|awq)(-int[48])?$", "", last)


def _some(names: tuple[str, ...]) -> str:
    named = ", ".join(names[:_MAX_NAMED])
    return named if len(names) <= _MAX_NAMED else f"{named} and {len(names) - _MAX_NAMED} more"


def _num_parameters(site: Site, rank: int) -> int:
    return rank * (site.in_features + site.out_features)
