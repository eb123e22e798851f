"""LoRA, DoRA, VeRA and IA3 as AdapterHub understands them; each differs from PEFT's kind of the same name.

    <path>.loras.<name>.lora_A      [rank, in_features]       no ".weight"
    <path>.loras.<name>.lora_B      [out_features, rank]
    <path>.loras.<name>.m.weight    [out_features, 1]         DoRA
    <path>.loras.<name>.vera_D, vera_B                        VeRA: square and dense, around shared lora_A and lora_B

    LoRA    y = base(x) + s * B A x                           s = alpha / r
    IA3     y = alpha * lora_B * base(x)                      always the output's scale, also in feed-forward blocks
    DoRA    y = g * (base(x) + s * B A x),  g = m / |W + B A| no s in the norm; the bias is scaled too
    VeRA    as LoRA (or DoRA) with A = vera_D lora_A, B = vera_B lora_B

GPT-2's `c_attn` is three linears in one: the factors of those of q, k and v that are adapted follow each other.

Running example: r = 4, alpha = 8 on q and v of a `c_attn` with hidden size 64
    lora_A [8, 64], lora_B [128, 4]     -> down [8, 64], up [192, 8]; the middle third of up is 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import AdapterForms, LinearDelta, SiteChange
from peft_core.methods.adapterhub.fields import TRAINING_ONLY, flag, layers_left_out, refuse_gates, wrong
from peft_core.methods.adapterhub.layout import Layout
from peft_core.methods.adapterhub.part import Reader
from peft_core.methods.adapterhub.tensors import HubTensors, Names, num_values, require_names, require_shape
from peft_core.methods.base_weights import require_base
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import FormName, MatchedSite
from peft_core.methods.tensors import require_finite
from peft_core.methods.tuner.config import some
from peft_core.methods.tuner.file import require_site
from peft_core.spec import BaseModelSpec, Site

_SHARED = ("lora_A", "lora_B")
_THIRDS = "qkv"  # in the order of the merged linear


@dataclass(frozen=True, slots=True)
class Settings:
    rank: int
    alpha: float
    is_scale: bool  # IA3
    is_vera: bool
    is_dora: bool
    keys: tuple[str, ...]  # of `Layout.linears`
    left_out: frozenset[int]
    starts_as_base: bool = True  # a module without tensors is as in the base, not random

    @property
    def scaling(self) -> float:
        return self.alpha if self.is_scale else self.alpha / self.rank

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the tensors that a module has for itself."""
        if self.is_scale:
            return ("lora_B",)
        factors = ("vera_D", "vera_B") if self.is_vera else ("lora_A", "lora_B")
        return (*factors, "m.weight") if self.is_dora else factors


@dataclass(frozen=True, slots=True)
class PlannedLinear:
    site: Site
    names: Names  # suffix -> tensor name
    thirds: tuple[bool, ...] | None  # of a merged linear: which of q, k, v are adapted


@dataclass(frozen=True, slots=True)
class LinearPlan:
    settings: Settings
    linears: Mapping[str, PlannedLinear]  # in the base's order
    shared: Names
    num_parameters: int
    warnings: tuple[str, ...]
    copies: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[MatchedSite, ...]:
        settings = self.settings
        found = []
        for path, planned in self.linears.items():
            rank = 0 if settings.is_scale else settings.rank * sum(planned.thirds or (True,))
            found.append(MatchedSite(path, rank, settings.scaling))
        return tuple(found)

    @property
    def forms(self) -> tuple[FormName, ...]:
        if self.settings.is_scale:
            return ("gain",)
        return ("low rank", "gain") if self.settings.is_dora else ("low rank",)

    @property
    def needs_base(self) -> bool:
        return self.settings.is_dora

    def read(self, reader: Reader) -> AdapterForms:
        linear: dict[str, LinearDelta] = {}
        changes: dict[str, SiteChange] = {}
        for path, planned in self.linears.items():
            if self.settings.is_scale:
                changes[path] = SiteChange(gain=self._gain(planned, reader))
                continue
            down, up = self._factors(planned, reader)
            gain = torch.ones(planned.site.out_features)
            if self.settings.is_dora:
                gain = self._magnitude(planned, reader, down, up)
                changes[path] = SiteChange(gain=gain)
            up = (gain * self.settings.scaling)[:, None] * up
            require_finite(up, planned.names[self.settings.suffixes[-1]])
            linear[path] = LinearDelta(down=down, up=up)
        return AdapterForms(linear=linear, changes=changes)

    def _gain(self, planned: PlannedLinear, reader: Reader) -> torch.Tensor:
        values = reader.read(planned.names["lora_B"]).flatten()
        if planned.thirds is not None:
            whole = torch.ones(planned.site.out_features)  # alpha scales the thirds that are not adapted, too
            whole[_rows(planned)] = values
            values = whole
        gain = self.settings.scaling * values
        require_finite(gain, planned.names["lora_B"])
        return gain

    def _factors(self, planned: PlannedLinear, reader: Reader) -> tuple[torch.Tensor, torch.Tensor]:
        """Down [rank, in_features] and up [out_features, rank], not scaled."""
        if self.settings.is_vera:
            outer, inner = reader.read(planned.names["vera_B"]), reader.read(planned.names["vera_D"])
            return inner @ reader.read(self.shared["lora_A"]), outer @ reader.read(self.shared["lora_B"])
        down, up = reader.read(planned.names["lora_A"]), reader.read(planned.names["lora_B"])
        if planned.thirds is None:
            return down, up
        whole = torch.zeros(planned.site.out_features, down.shape[0])
        whole[_rows(planned)] = torch.block_diag(*up.chunk(sum(planned.thirds)))
        return down, whole

    def _magnitude(self, planned: PlannedLinear, reader: Reader, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What DoRA makes of each output's length.  # [out_features]"""
        weight = require_base(reader.base, "DoRA").weight(planned.site.path)
        length: torch.Tensor = torch.linalg.vector_norm(weight + up @ down, dim=1)
        gain = reader.read(planned.names["m.weight"]).flatten() / length
        require_finite(gain, planned.names["m.weight"])
        return gain


def plan_linears(ledger: ConfigLedger, tensors: HubTensors, layout: Layout | None, spec: BaseModelSpec) -> LinearPlan:
    """Decide everything about the linears of one configuration, and take their tensors.

    Args:
        layout: None for an architecture that the library does not know of itself; then the file alone decides.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor.
    """
    settings = _read_settings(ledger)
    meant = _targets(settings, layout, spec)
    paths = [path for path in tensors.linears() if meant is None or path in meant]
    planned = {path: _plan_one(settings, tensors, layout, spec, path) for path in paths}
    shared = tensors.lend_shared(_SHARED) if settings.is_vera else {}
    if settings.is_vera:
        require_names(shared, _SHARED, "what the adapter's modules share")
        _require_shared(settings, planned, shared, tensors)
    missing = [path for path in meant or () if path not in planned and path in spec.sites]
    if missing and not settings.starts_as_base:
        raise MalformedAdapter(
            f"the config speaks of {some(missing)}, for which the file has no tensors; untrained, they would not be as "
            "in the base. Save the adapter again with all its tensors."
        )
    warnings = (f"The file has no tensors for {some(missing)}: left as in the base.",) if missing else ()
    names = [name for one in planned.values() for name in one.names.values()] + list(shared.values())
    return LinearPlan(
        settings,
        linears={path: planned[path] for path in spec.sites if path in planned},
        shared=shared,
        num_parameters=sum(num_values(tensors.header, name) for name in names),
        warnings=warnings,
    )


def _read_settings(ledger: ConfigLedger) -> Settings:
    refuse_gates(ledger)
    start = ledger.use("init_weights", "lora")
    ledger.set_aside(TRAINING_ONLY)
    mode = ledger.use("composition_mode", "add")
    if mode not in ("add", "scale"):
        raise wrong("composition_mode", mode, '"add" or "scale"')
    matrices = ledger.use("attn_matrices", ["q", "v"])
    if not isinstance(matrices, list | tuple) or not all(key in ("q", "k", "v") for key in matrices):
        refuse("attn_matrices", matrices, 'the library adapts "q", "k" and "v" only.')
    attention = tuple(key for key in _THIRDS if key in matrices) if flag(ledger, "selfattn_lora", default=True) else ()
    feed_forward = tuple(key for key in ("intermediate", "output") if flag(ledger, f"{key}_lora", default=False))
    vera = (ledger.use("vera_d"), ledger.use("vera_b"))
    settings = Settings(
        rank=ledger.use_count("r") or 8,
        alpha=ledger.use_number("alpha", 8),
        is_scale=mode == "scale",
        is_vera=mode == "add" and any(isinstance(value, float) for value in vera),
        is_dora=flag(ledger, "use_dora", default=False),
        keys=(*attention, *feed_forward),
        left_out=layers_left_out(ledger),
    )
    ledger.close()
    if settings.is_scale and (settings.rank != 1 or settings.is_dora):
        raise wrong("composition_mode", mode, '"add", or r = 1 without DoRA')
    starts_as_base = start == "lora"
    if settings.is_scale:
        starts_as_base = start == "ia3" and settings.alpha == 1
    elif settings.is_vera:
        starts_as_base = vera[1] == 0
    return replace(settings, starts_as_base=starts_as_base)


def _targets(settings: Settings, layout: Layout | None, spec: BaseModelSpec) -> frozenset[str] | None:
    """Paths that the configuration means."""
    if layout is None:
        return None
    numbers = [number for number in range(spec.num_layers) if number not in settings.left_out]
    return frozenset(f"{layout.layer(number)}.{layout.linears[key]}" for number in numbers for key in settings.keys)


def _plan_one(
    settings: Settings, tensors: HubTensors, layout: Layout | None, spec: BaseModelSpec, path: str
) -> PlannedLinear:
    names, header = tensors.linear(path), tensors.header
    site = require_site(path, next(iter(names.values())), spec)
    require_names(names, settings.suffixes, f'"{path}"')
    is_merged = layout is not None and layout.merges_attention and path.endswith(layout.linears["q"])
    _refuse_impossible(settings, site, is_merged)
    thirds = tuple(key in settings.keys for key in _THIRDS) if is_merged else None
    num_parts = sum(thirds) if thirds else 1
    num_outputs = site.out_features // 3 * num_parts if thirds else site.out_features
    shapes: dict[str, tuple[int, ...]] = {
        "lora_A": (settings.rank * num_parts, site.in_features),
        "lora_B": (num_outputs, settings.rank),
        "vera_D": (settings.rank, settings.rank),
        "vera_B": (num_outputs, num_outputs),
        "m.weight": (num_outputs, 1),
    }
    for suffix, name in names.items():
        require_shape(header, name, shapes[suffix], of_base=_is_of_base(suffix, header[name].shape, shapes[suffix]))
    return PlannedLinear(site, names, thirds)


def _is_of_base(suffix: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a wrong shape would be the base's doing: the sizes that the config decides are right."""
    if suffix in ("vera_B", "m.weight"):
        return True
    side = {"lora_A": 0, "lora_B": 1}.get(suffix)
    return side is not None and len(shape) == 2 and shape[side] == expected[side]


def _refuse_impossible(settings: Settings, site: Site, is_merged: bool) -> None:
    if settings.is_dora and site.transposed:
        refuse("use_dora", True, f'the library itself fails on this at a Conv1D ("{site.path}").')
    if settings.is_vera and is_merged:
        refuse("vera_d", "a number", f'the library itself fails on VeRA at "{site.path}".')


def _require_shared(
    settings: Settings, planned: Mapping[str, PlannedLinear], shared: Names, tensors: HubTensors
) -> None:
    for path, one in planned.items():
        shapes = {"lora_A": (settings.rank, one.site.in_features), "lora_B": (one.site.out_features, settings.rank)}
        for suffix, shape in shapes.items():
            if tuple(tensors.header[shared[suffix]].shape) != shape:
                raise MalformedAdapter(
                    f'tensor "{shared[suffix]}" has shape {list(tensors.header[shared[suffix]].shape)}, but "{path}" '
                    f"needs {list(shape)}: modules of different sizes cannot share it. Save the adapter again.",
                    tensor=shared[suffix],
                )
            require_shape(tensors.header, shared[suffix], shape)


def _rows(planned: PlannedLinear) -> torch.Tensor:
    """Which rows of a merged linear are adapted.  # [out_features] bool"""
    assert planned.thirds is not None
    return torch.tensor(planned.thirds).repeat_interleave(planned.site.out_features // 3)
