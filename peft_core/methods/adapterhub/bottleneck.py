"""Bottlenecks of AdapterHub (Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2022, AdapterPlus, Compacter).

    <layer>.<place>.adapters.<name>.adapter_down.0.weight   [width, hidden_size]    .1 where a norm stands before it
    <layer>.<place>.adapters.<name>.adapter_up.weight       [hidden_size, width]
    ... adapter_norm_before, adapter_norm_after, scaling

    a(z) = scaling * up(activation(down(z)))

`place` is `attention_adapters` or `output_adapters` (the feed-forward block). With h the block's output and r the
residual stream before the block's own norm, the library computes, in place of r + h,

    sequential      r + x + a(u)     u = h + r where original_ln_before, else h;  x = h, or u: residual_before_ln off
    parallel        r + h + a(r)

and leaves out r where original_ln_after is off. See `reading` for what this becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peft_core.forms import Activation, AdapterForms, Bottleneck, LinearDelta
from peft_core.methods.adapterhub.fields import TRAINING_ONLY, activation, layers_left_out, refuse_gates, wrong
from peft_core.methods.adapterhub.hypercomplex import Hypercomplex, Side, read_hypercomplex
from peft_core.methods.adapterhub.layout import PLACES, Layout, Place
from peft_core.methods.adapterhub.part import Reader
from peft_core.methods.adapterhub.reading import Reading, Switches, read_switches
from peft_core.methods.adapterhub.tensors import HubTensors, Names, num_values, require_names, require_shape
from peft_core.methods.base_weights import require_base
from peft_core.methods.ledger import ConfigLedger, is_number, refuse
from peft_core.methods.report import FormName, MatchedSite
from peft_core.methods.tensors import require_finite
from peft_core.spec import BaseModelSpec

_OLD: Mapping[str, str] = {
    "attention_type": "written by early versions, read by none",
    "new_attention_norm": "written by early versions, read by none",
    "inv_adapter_reduction_factor": "means nothing without an invertible adapter",
}
_MAX_WIDENING = 4  # what is hypercomplex is small in the file and whole in memory
_NORM_EPSILON = 1e-5  # of the norms that an adapter brings
_DOWN, _UP = "adapter_down", "adapter_up"
_BEFORE, _AFTER = "adapter_norm_before", "adapter_norm_after"


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration, as far as the outputs depend on it."""

    places: tuple[Place, ...]
    left_out: frozenset[int]
    reduction: Any  # a number, or an object of numbers by layer
    activation: Activation
    scaling: float | str  # "learned" or "channel" where it is a tensor
    switches: Switches
    hypercomplex: Hypercomplex | None


@dataclass(frozen=True, slots=True)
class PlannedBottleneck:
    """One bottleneck: its tensors and what it reads."""

    block: str
    names: Names  # suffix -> tensor name, for itself
    shared: Names  # suffix -> tensor name, for all
    reading: Reading
    width: int


@dataclass(frozen=True, slots=True)
class BottleneckPlan:
    settings: Settings
    bottlenecks: tuple[PlannedBottleneck, ...]
    epsilons: Mapping[str, float]  # of the base's norms
    num_parameters: int
    copies: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[MatchedSite, ...]:
        scaling = self.settings.scaling
        told = scaling if isinstance(scaling, float) else 1.0
        return tuple(MatchedSite(planned.block, planned.width, told) for planned in self.bottlenecks)

    @property
    def forms(self) -> tuple[FormName, ...]:
        return ("bottleneck",)

    @property
    def needs_base(self) -> bool:
        return any(planned.reading.base_norm is not None for planned in self.bottlenecks)

    def read(self, reader: Reader) -> AdapterForms:
        """Put biases and scalings into the matrices; expand what is hypercomplex."""
        linear: dict[str, LinearDelta] = {}
        bottlenecks: dict[str, Bottleneck] = {}
        for planned in self.bottlenecks:
            linear[planned.block], up_bias = self._matrices(planned, reader)
            bottlenecks[planned.block] = self._network(planned, up_bias, reader)
        return AdapterForms(linear=linear, bottlenecks=bottlenecks)

    def _matrices(self, planned: PlannedBottleneck, reader: Reader) -> tuple[LinearDelta, torch.Tensor]:
        names, down_module = planned.names, self.settings.switches.down_module
        down, down_bias = self._side(planned, reader, "down", down_module)
        up, up_bias = self._side(planned, reader, "up", _UP)
        scaling = self.settings.scaling
        factor = torch.tensor(scaling) if isinstance(scaling, float) else reader.read(names["scaling"])
        up, up_bias = factor[..., None] * up, factor * up_bias
        tensor = next(iter(names.values()))
        for values in (down, up, up_bias):
            require_finite(values, tensor)
        return LinearDelta(torch.cat([down, down_bias[:, None]], dim=1), up.contiguous()), up_bias

    def _side(
        self, planned: PlannedBottleneck, reader: Reader, side: Side, module: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One of the two linears: weight [outputs, inputs] and bias."""
        names, hypercomplex = planned.names, self.settings.hypercomplex
        if hypercomplex is None:
            return reader.read(names[f"{module}.weight"]), reader.read(names[f"{module}.bias"])
        weight = hypercomplex.weight(
            side, own=lambda name: reader.read(names[f"{module}.{name}"]), shared=_from(reader, planned.shared)
        )
        bias = reader.read(names[f"{module}.b"]) if hypercomplex.has_bias else torch.zeros(weight.shape[0])
        return weight, bias

    def _network(self, planned: PlannedBottleneck, up_bias: torch.Tensor, reader: Reader) -> Bottleneck:
        names, reading = planned.names, planned.reading
        values: dict[str, Any] = {}
        if reading.base_norm is not None:
            base = require_base(reader.base, "An adapter that applies one of the base's norms")
            # Gemma keeps the weight's distance from 1.
            values |= {
                "norm_in_weight": 1 + base.weight(reading.base_norm),
                "norm_in_epsilon": self.epsilons[reading.base_norm],
            }
        if self.settings.switches.ln_before:
            first = f"{_DOWN}.0"
            values |= {
                "norm_in_weight": reader.read(names[f"{first}.weight"]),
                "norm_in_bias": reader.read(names[f"{first}.bias"]),
                "norm_in_epsilon": _NORM_EPSILON,
            }
            _require_copies(planned, reader, values)
        if self.settings.switches.ln_after:
            values |= {
                "norm_out_weight": reader.read(names[f"{_AFTER}.weight"]),
                "norm_out_bias": reader.read(names[f"{_AFTER}.bias"]),
                "norm_out_of": reading.norm_out_of,
                "norm_out_epsilon": _NORM_EPSILON,
            }
        return Bottleneck(
            activation=self.settings.activation,
            reads=reading.reads,
            residual=reading.residual,
            up_bias=up_bias,
            **values,
        )


def plan_bottlenecks(ledger: ConfigLedger, tensors: HubTensors, layout: Layout, spec: BaseModelSpec) -> BottleneckPlan:
    """Decide everything about the bottlenecks of one configuration, and take their tensors.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor.
    """
    settings = _read_settings(ledger)
    planned: list[PlannedBottleneck] = []
    for number in range(spec.num_layers):
        for place in () if number in settings.left_out else settings.places:
            planned.append(_plan_one(settings, tensors, layout, spec, number, place))
    used = {name for one in planned for name in (*one.names.values(), *one.shared.values())}
    copies = tuple(name for one in planned for key, name in one.names.items() if key.startswith(_BEFORE))
    norms = {one.reading.base_norm for one in planned if one.reading.base_norm is not None}
    return BottleneckPlan(
        settings,
        tuple(planned),
        epsilons={norm: spec.norms[norm].epsilon for norm in norms},
        num_parameters=sum(num_values(tensors.header, name) for name in used - set(copies)),
        copies=copies,
    )


def _read_settings(ledger: ConfigLedger) -> Settings:
    refuse_gates(ledger)
    ledger.set_aside(TRAINING_ONLY)
    inverse = ledger.use("inv_adapter") or ledger.use("invertible_adapter")
    if inverse is not None:
        refuse("inv_adapter", inverse, "invertible adapters behind the embeddings are not served. Train without one.")
    ledger.set_aside(_OLD)
    on: dict[Place, bool] = {
        "attention_adapters": ledger.use_flag("mh_adapter"),
        "output_adapters": ledger.use_flag("output_adapter"),
    }
    settings = Settings(
        places=tuple(place for place in PLACES if on[place]),
        left_out=layers_left_out(ledger),
        reduction=ledger.use("reduction_factor"),
        activation=activation(ledger, None),
        scaling=_read_scaling(ledger),
        switches=read_switches(ledger),
        hypercomplex=read_hypercomplex(ledger),
    )
    ledger.close()
    return settings


def _read_scaling(ledger: ConfigLedger) -> float | str:
    value = ledger.use("scaling", 1.0)
    if value in ("learned", "channel"):
        return str(value)
    if not is_number(value):
        raise wrong("scaling", value, 'a finite number, "learned" or "channel"')
    return float(value)


def _plan_one(
    settings: Settings, tensors: HubTensors, layout: Layout, spec: BaseModelSpec, number: int, place: Place
) -> PlannedBottleneck:
    block = layout.block(number, place)
    if block not in spec.blocks:
        refuse("architecture", None, f'"{block}" of this base is no block beside which a bottleneck can stand.')
    reading = settings.switches.reading(layout, place, spec.num_layers)
    if reading.base_norm is not None and reading.base_norm not in spec.norms:
        refuse("original_ln_before", True, f'this base has no norm "{reading.base_norm}", which the adapter applies.')
    width = _width(settings.reduction, number, spec.hidden_size)
    names = tensors.bottleneck(layout.layer(number), place)
    expected, shared_shapes = _expected(settings, spec.hidden_size, width)
    if settings.switches.ln_before:  # the same norm under a second name, which may be missing
        aliases = {f"{_BEFORE}.{key}": (spec.hidden_size,) for key in ("weight", "bias")}
        expected |= {key: shape for key, shape in aliases.items() if key in names}
    require_names(names, tuple(expected), f'the bottleneck at "{block}"')
    for suffix, shape in expected.items():
        require_shape(tensors.header, names[suffix], shape)
    shared = tensors.lend_shared(tuple(shared_shapes))
    require_names(shared, tuple(shared_shapes), "what the adapter's modules share")
    for suffix, shape in shared_shapes.items():
        require_shape(tensors.header, shared[suffix], shape)
    return PlannedBottleneck(block, names, shared, reading, width)


def _width(reduction: Any, number: int, hidden_size: int) -> int:
    """Values in the middle of the bottleneck."""
    value = reduction
    if isinstance(reduction, dict):
        value = reduction.get(str(number), reduction.get("default"))
    if not is_number(value) or value <= 0:
        raise wrong("reduction_factor", reduction, "a number above 0, or an object of such numbers for every layer")
    if value < 1 / _MAX_WIDENING:
        refuse(
            "reduction_factor", value, f"bottlenecks wider than {_MAX_WIDENING} times the hidden size are not served."
        )
    return max(1, int(hidden_size // value))


def _expected(
    settings: Settings, hidden: int, width: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Suffix -> shape: of a bottleneck's own tensors, and of those that it shares."""
    switches, hypercomplex = settings.switches, settings.hypercomplex
    own: dict[str, tuple[int, ...]] = {}
    shared: dict[str, tuple[int, ...]] = {}
    sides: tuple[tuple[Side, str, int, int], ...] = (
        ("down", switches.down_module, hidden, width),
        ("up", _UP, width, hidden),
    )
    for side, module, num_inputs, num_outputs in sides:
        if hypercomplex is None:
            own |= {f"{module}.weight": (num_outputs, num_inputs), f"{module}.bias": (num_outputs,)}
            continue
        mine = hypercomplex.own(num_inputs, num_outputs)
        own |= {f"{module}.{name}": shape for name, shape in mine.items()}
        shared |= hypercomplex.shared(side, num_inputs, num_outputs)
    norms = ([f"{_DOWN}.0"] if switches.ln_before else []) + ([_AFTER] if switches.ln_after else [])
    own |= {f"{norm}.{key}": (hidden,) for norm in norms for key in ("weight", "bias")}
    if isinstance(settings.scaling, str):
        own["scaling"] = (1,) if settings.scaling == "learned" else (hidden,)
    return own, shared


def _from(reader: Reader, names: Names) -> Callable[[str], torch.Tensor]:
    return lambda name: reader.read(names[name])


def _require_copies(planned: PlannedBottleneck, reader: Reader, values: Mapping[str, Any]) -> None:
    """The norm before the bottleneck stands in the file twice; both must say the same."""
    for key in ("weight", "bias"):
        name = planned.names.get(f"{_BEFORE}.{key}")
        if name is not None and not torch.equal(reader.read(name), values[f"norm_in_{key}"]):
            raise wrong("ln_before", True, f'"{name}" and its second name "{_DOWN}.0.{key}" to hold the same')
