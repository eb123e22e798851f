"""LoRA on a mixture of experts: factors of stacked weights and of routers, in both spellings (`expert_names`).

    stacked                 E experts' factors are two matrices, see `expert_factors` for their order
    one module an expert    gate and up projection each have their own factors, and become one addition of rank 2r to
                            the stacked weight of both

The scaling is alpha / r, or alpha / sqrt(r), with each factor's own r as it is in the file. (PEFT 0.21 converts
factors of single experts to rank 2r with twice the alpha, which is the same only without rank stabilisation.)

Running example: r = 4 on 8 experts of Mixtral, hidden size 64, intermediate size 128
    experts.base_layer.lora_A [32, 64], lora_B [256, 32]    gate_up_proj
    experts.lora_A [32, 128], lora_B [64, 32]               down_proj
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter, shown
from peft_core.forms import ExpertDelta
from peft_core.methods.ledger import refuse
from peft_core.methods.lora.config import LoraConfig
from peft_core.methods.lora.expert_factors import SingleFactors, joint_rank, read_single, read_stacked
from peft_core.methods.lora.expert_names import (
    Factors,
    RouterPlace,
    SinglePlace,
    StackedPlace,
    expert_modules,
    matching_parameters,
    place_of,
    stack_of,
)
from peft_core.methods.lora.sites import DOWN, UP
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header, TensorSource, require_matrix
from peft_core.methods.tuner.file import require_all
from peft_core.spec import BaseModelSpec


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """All decisions about one adapter's experts and routers."""

    spec: BaseModelSpec
    stacked: Mapping[str, Factors] = field(default_factory=dict)  # by parameter
    single: Mapping[str, tuple[SingleFactors, ...]] = field(default_factory=dict)  # by parameter
    sites: tuple[MatchedSite, ...] = ()  # one a parameter, in the base's order
    owned: frozenset[str] = frozenset()  # paths of the file that are of experts and routers
    linears: frozenset[str] = frozenset()  # that target_parameters means by their weights
    paths: tuple[str, ...] = ()  # as patterns of ranks and alphas match them
    num_parameters: int = 0
    missing: tuple[str, ...] = ()  # targeted, but without tensors
    warnings: tuple[str, ...] = ()

    def read(self, tensors: TensorSource) -> dict[str, ExpertDelta]:
        """By parameter.

        Raises:
            MalformedAdapter: a tensor holds NaN or infinity, or is not what the header announced.
        """
        deltas = {}
        for site in self.sites:
            stack = stack_of(site.path, self.spec)
            if site.path in self.stacked:
                deltas[site.path] = read_stacked(tensors, self.stacked[site.path], stack, site.scaling)
            else:
                deltas[site.path] = read_single(tensors, self.single[site.path], stack)
        return deltas


def _linears(targets: tuple[str, ...], spec: BaseModelSpec) -> frozenset[str]:
    """Paths of linears that target_parameters means by their weights: the same as if target_modules named them.

    Raises:
        BaseMismatch: an entry means no parameter of this base.
        UnsupportedAdapter: it means a weight that is stored transposed, or a bias.
    """
    paths = set()
    for target, names in matching_parameters(targets, spec).items():
        if not names:
            raise BaseMismatch(
                f'field "target_parameters" names {shown(target)}, which is no weight of an expert, a router or a '
                f"linear module of this base ({spec.model_type}). Use the base that the adapter was trained on, or "
                "train it without this parameter.",
                field="target_parameters",
                value=target,
            )
        linears = {name.removesuffix(".weight") for name in names if name not in spec.expert_parameters}
        for path in linears:
            if spec.sites[path].transposed:
                refuse(
                    "target_parameters",
                    target,
                    f'"{path}" stores its weight transposed. Name the module in target_modules instead.',
                )
        paths |= linears
    return frozenset(paths)


def plan_experts(
    modules: Mapping[str, Mapping[str, str]], lora: LoraConfig, header: Header, spec: BaseModelSpec
) -> ExpertPlan:
    """Decide everything about the factors of experts and routers, and leave all others alone.

    Args:
        modules: path in the file -> suffix -> tensor name.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    linears = _linears(lora.parameters, spec)
    if not spec.expert_parameters:
        return ExpertPlan(spec, linears=linears)
    factors = {
        path: _factors(path, tensors, lora)
        for path, tensors in modules.items()
        if path not in spec.sites and place_of(path, spec) is not None
    }
    targeted = {name for names in matching_parameters(lora.parameters, spec).values() for name in names}
    stacked, single, paths = _placed(factors, targeted, lora, header, spec)
    sites = []
    for parameter in spec.expert_parameters:
        if parameter in stacked and parameter in single:
            _refuse_doubled(stacked[parameter])
        if parameter in stacked:
            sites.append(_match_stacked(parameter, stacked[parameter], paths[parameter][0], lora, header, spec))
        elif parameter in single:
            sites.append(MatchedSite(parameter, joint_rank(single[parameter]), single[parameter][0].scaling))
    return ExpertPlan(
        spec=spec,
        stacked=stacked,
        single=single,
        sites=tuple(sites),
        owned=frozenset(factors),
        linears=linears,
        paths=tuple(path for site in sites for path in paths[site.path]),
        num_parameters=sum(math.prod(header[name].shape) for names in factors.values() for name in names),
        missing=tuple(_missing(targeted, lora, {site.path for site in sites}, spec)),
        warnings=tuple(_warnings(single, lora)),
    )


def _factors(path: str, tensors: Mapping[str, str], lora: LoraConfig) -> Factors:
    """The two factors of one path, which may have nothing else."""
    require_all(tensors, path, (DOWN, UP))
    for suffix, name in tensors.items():
        if suffix not in (DOWN, UP):
            raise UnsupportedAdapter(
                f'tensor "{name}" belongs to a variant of LoRA that is not served on experts or routers. '
                "Train a plain LoRA there.",
                tensor=name,
            )
    variants = {
        "use_dora": lora.has_magnitudes,
        "lora_bias": lora.has_bias,
        "kasa_config": lora.has_diagonal,
        "use_bdlora": lora.blocks is not None,
        "use_qalora": lora.pool > 1,
        "init_lora_weights": lora.changes_base,
    }
    for field_name, is_on in variants.items():
        if is_on:
            value = lora.start if field_name == "init_lora_weights" else True
            refuse(field_name, value, f'it is not served on "{path}". Train a plain LoRA on experts and routers.')
    return Factors(tensors[DOWN], tensors[UP])


def _placed(
    factors: Mapping[str, Factors], targeted: set[str], lora: LoraConfig, header: Header, spec: BaseModelSpec
) -> tuple[dict[str, Factors], dict[str, tuple[SingleFactors, ...]], dict[str, list[str]]]:
    """Factors by parameter, stacked and single, and the paths that patterns are matched against."""
    modules = {module: [name for name in names if name in targeted] for module, names in expert_modules(spec).items()}
    stacked: dict[str, Factors] = {}
    single: dict[str, tuple[SingleFactors, ...]] = {}
    paths: dict[str, list[str]] = {}
    for path, names in factors.items():
        place = place_of(path, spec)
        if isinstance(place, SinglePlace):
            _require_targeted(path, names, lora)
            single[place.parameter] = (
                *single.get(place.parameter, ()),
                _match_single(path, place, names, lora, header, spec),
            )
            paths.setdefault(place.parameter, []).append(path)
            continue
        if isinstance(place, StackedPlace):
            parameter, pattern_path = _stacked_parameter(place, names, modules[place.module])
        else:
            assert isinstance(place, RouterPlace)
            parameter = place.parameter
            pattern_path = parameter if parameter in targeted else path
            if parameter not in targeted:
                _require_targeted(path, names, lora)
        if parameter in stacked:
            _refuse_doubled(names)
        stacked[parameter] = names
        paths.setdefault(parameter, []).append(pattern_path)
    return stacked, single, paths


def _stacked_parameter(place: StackedPlace, names: Factors, targeted: list[str]) -> tuple[str, str]:
    """PEFT wraps a module once for each targeted parameter, in the order of the module: the last is outermost."""
    if place.depth >= len(targeted):
        raise UnsupportedAdapter(
            f'tensor "{names.down}" belongs to a parameter of "{place.module}" that the config does not target. '
            "PEFT would drop it in silence. Correct target_parameters, or remove the tensors.",
            tensor=names.down,
        )
    parameter = targeted[len(targeted) - 1 - place.depth]
    return parameter, parameter


def _require_targeted(path: str, names: Factors, lora: LoraConfig) -> None:
    rule = lora.common.rule
    if rule is None and not lora.parameters:
        return
    if rule is not None and (rule.matches(path) or (rule.is_all_linear and not rule.leaves_out(path))):
        return
    raise UnsupportedAdapter(
        f'tensor "{names.down}" belongs to a module that the config does not target. PEFT would drop it in silence. '
        "Correct target_modules, exclude_modules or layers_to_transform, or remove the tensors.",
        tensor=names.down,
    )


def _refuse_doubled(names: Factors) -> None:
    raise MalformedAdapter(
        f'tensor "{names.down}" and other tensors of the file are factors of the same weights. Save the adapter again.',
        tensor=names.down,
    )


def _match_stacked(
    parameter: str, names: Factors, path: str, lora: LoraConfig, header: Header, spec: BaseModelSpec
) -> MatchedSite:
    stack = stack_of(parameter, spec)
    rows, _ = require_matrix(header, names.down)
    rank = rows // stack.experts
    if not rank or rows % stack.experts:
        raise BaseMismatch(
            f'tensor "{names.down}" has {rows} rows, which are not the same number for each of {stack.experts} experts '
            f'of "{parameter}". Use the base that the adapter was trained on.',
            tensor=names.down,
        )
    _require_shapes(names, (rows, stack.inputs), (stack.outputs, rows), parameter, header)
    return MatchedSite(parameter, rank, _scaling(path, names, rank, lora))


def _match_single(
    path: str, place: SinglePlace, names: Factors, lora: LoraConfig, header: Header, spec: BaseModelSpec
) -> SingleFactors:
    stack = stack_of(place.parameter, spec)
    rank, _ = require_matrix(header, names.down)
    outputs = stack.outputs if place.half is None else stack.outputs // 2
    _require_shapes(names, (rank, stack.inputs), (outputs, rank), path, header)
    return SingleFactors(place, names, rank, _scaling(path, names, rank, lora))


def _require_shapes(names: Factors, down: tuple[int, int], up: tuple[int, int], where: str, header: Header) -> None:
    for name, expected in ((names.down, down), (names.up, up)):
        got = require_matrix(header, name)
        if got != expected:
            raise BaseMismatch(
                f'tensor "{name}" has shape {list(got)}; "{where}" of this base needs {list(expected)}. '
                "Use the base that the adapter was trained on, and the config that the adapter was saved with.",
                tensor=name,
            )


def _scaling(path: str, names: Factors, rank: int, lora: LoraConfig) -> float:
    stated = lora.stated_rank(path)
    if stated is not None and stated != rank:
        raise MalformedAdapter(
            f'tensor "{names.down}" has rank {rank}, but the config says {shown(stated)} for "{path}", so its scaling '
            "is unclear. Correct r and rank_pattern; the first pattern that fits counts.",
            tensor=names.down,
        )
    return lora.scaling(path, rank)


def _missing(targeted: set[str], lora: LoraConfig, found: set[str], spec: BaseModelSpec) -> Iterator[str]:
    for parameter in spec.expert_parameters:
        by_rule = lora.common.rule is not None and lora.common.rule.matches(parameter.removesuffix(".weight"))
        if parameter in found or not (by_rule or parameter in targeted):
            continue
        if lora.start != "plain":
            refuse(
                "init_lora_weights",
                False if lora.start == "random" else lora.start,
                f'the config targets "{parameter}", for which the file has no tensors, and untrained factors that '
                "began so are not neutral. Save the adapter again with all its tensors.",
            )
        yield parameter


def _warnings(single: Mapping[str, tuple[SingleFactors, ...]], lora: LoraConfig) -> Iterator[str]:
    if lora.is_rank_stabilised and any(one.place.half is not None for many in single.values() for one in many):
        yield (
            "Factors of single experts are served with the scaling that they were trained with, alpha / sqrt(r). "
            "PEFT 0.21 doubles r and alpha of gate and up projections when it stacks them, which makes them "
            "1.41 times as strong."
        )
