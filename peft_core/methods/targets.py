"""Which modules of the base a config means, exactly as HF PEFT reads it.

    a string     a pattern that must match the whole path (`all-linear`: every linear but the head)
    a list       each entry is a whole path or the end of one: "q_proj" means "....q_proj"
    exclusions   read the same way, and stronger
    saved        modules that are replaced as a whole are never meant, nor is anything inside them
    layers       only for entries that are the end of a path: the first numbered part of the path must be among them

(https://huggingface.co/docs/peft/developer_guides/lora, and `check_target_module_exists` of PEFT 0.21.)

Running example: TargetRule(frozenset({"q_proj"}), layers=frozenset({0, 2})) over three layers
    matches("model.layers.0.self_attn.q_proj")  -> True
    matches("model.layers.1.self_attn.q_proj")  -> False
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter, shown
from peft_core.spec import BaseModelSpec, SiteKind

Names = str | frozenset[str]  # a pattern, or names; empty is nothing
ALL_LINEAR = "all-linear"
_ANY_LAYER = r".*?\.[^.]*\.(?P<layer>\d+)\."


@dataclass(frozen=True, slots=True)
class TargetRule:
    targets: Names
    exclude: Names = frozenset()
    layers: frozenset[int] = frozenset()  # empty is all
    layers_patterns: tuple[str, ...] = ()  # () is any
    saved: tuple[str, ...] = ()  # modules_to_save, patterns as PEFT reads them

    def __post_init__(self) -> None:
        """Raises MalformedAdapter, naming the field, where a pattern is not a regular expression."""
        if isinstance(self.targets, str):
            require_pattern("target_modules", self.targets)
        if isinstance(self.exclude, str):
            require_pattern("exclude_modules", self.exclude)
        for pattern in self.layers_patterns:
            require_pattern("layers_pattern", pattern, _layer_expression(pattern))
        for pattern in self.saved:
            require_pattern("modules_to_save", pattern, _within_expression(pattern))

    @property
    def is_all_linear(self) -> bool:
        return isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR

    def matches(self, path: str) -> bool:
        if self.leaves_out(path):
            return False
        if not _names_match(self.targets, path):
            return False
        if isinstance(self.targets, str) or path in self.targets or not self.layers:
            return True
        return self.layer_of(path) in self.layers

    def leaves_out(self, path: str) -> bool:
        """Whether a path is excluded, or lies in a module that is replaced."""
        if any(re.match(_within_expression(pattern), path) for pattern in self.saved):
            return True
        return _names_match(self.exclude, path)

    def layer_of(self, path: str) -> int | None:
        """The number that `layers` speaks of; None for a path outside numbered layers."""
        for pattern in self.layers_patterns or (None,):
            found = re.match(_ANY_LAYER if pattern is None else _layer_expression(pattern), path)
            if found:
                return int(found["layer"])
        return None


def targeted_sites(
    rule: TargetRule,
    spec: BaseModelSpec,
    kinds: Collection[SiteKind] = ("linear", "head"),
    experts: Collection[str] | None = None,
) -> frozenset[str]:
    """Paths of the sites that a rule means.

    Args:
        kinds: of sites that the adapter's kind can change.
        experts: paths in the file that are of experts or routers; what a rule means there is then the caller's
            business. None: the kind changes no experts.

    Raises:
        BaseMismatch: a target, or a layer, does not exist in this base.
        UnsupportedAdapter: a target is there, but is of another kind.
    """
    if rule.is_all_linear:
        every = (site.path for site in spec.sites.values() if site.kind == "linear")
        return frozenset(path for path in every if not rule.leaves_out(path))
    _require_existing(rule, spec, experts or ())
    for path in (*spec.other_modules, *spec.norms):
        is_adaptable = experts is not None and not spec.expert_parameters.keys().isdisjoint((path, f"{path}.weight"))
        if rule.matches(path) and not is_adaptable:
            _refuse_other(rule, path)
    matched = frozenset(path for path in spec.sites if rule.matches(path))
    for path in matched:
        if spec.sites[path].kind not in kinds:
            raise UnsupportedAdapter(
                f'field "target_modules" means the {spec.sites[path].kind} "{path}", which adapters of this kind are '
                "not served on. Train without it, or leave it out of target_modules.",
                field="target_modules",
                value=_plain(rule.targets),
            )
    return matched


def first_match(patterns: Mapping[str, float], path: str) -> float | None:
    """The value of the first pattern, in the order of the file, that fits the end of a path."""
    key = first_pattern(patterns, path)
    return None if key is None else patterns[key]


def first_pattern(patterns: Iterable[str], path: str) -> str | None:
    """As `first_match`, but the pattern itself."""
    return next((pattern for pattern in patterns if re.match(_ending_expression(pattern), path)), None)


def require_endings(field: str, patterns: Iterable[str]) -> None:
    """Raises MalformedAdapter, naming the field, unless `first_match` can use every pattern."""
    for pattern in patterns:
        require_pattern(field, pattern, _ending_expression(pattern))


def require_pattern(field: str, pattern: str, expression: str | None = None) -> None:
    """Raises MalformedAdapter, naming the field, unless a pattern, as it is used, is a regular expression."""
    try:
        re.compile(pattern if expression is None else expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise MalformedAdapter(
            f'field "{field}" holds {shown(pattern)}, which is no regular expression: {error}. '
            "Correct adapter_config.json.",
            field=field,
            value=pattern,
        ) from error


def _ending_expression(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _layer_expression(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\."


def _within_expression(pattern: str) -> str:
    return rf"(^|.*\.){pattern}($|\..*)"


def _names_match(names: Names, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return not names.isdisjoint(_endings(path))


def _endings(path: str) -> list[str]:
    """The path, and what follows each of its dots."""
    parts = path.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _require_existing(rule: TargetRule, spec: BaseModelSpec, experts: Collection[str]) -> None:
    for entry in _unknown_entries(rule.targets, (*spec.sites, *spec.norms, *spec.other_modules, *experts)):
        raise BaseMismatch(
            f'field "target_modules" names {shown(entry)}, which this base ({spec.model_type}) does not have. '
            "Use the base that the adapter was trained on; if the adapter has no tensors for it, remove the entry.",
            field="target_modules",
            value=entry,
        )
    present = {rule.layer_of(path) for path in spec.sites}
    for layer in sorted(rule.layers - present):
        raise BaseMismatch(
            f'field "layers_to_transform" names layer {shown(layer)}, which this base ({spec.num_layers} layers) does '
            "not have. Use the base that the adapter was trained on.",
            field="layers_to_transform",
            value=layer,
        )


def _unknown_entries(targets: Names, paths: Iterable[str]) -> list[str]:
    if isinstance(targets, str):
        return [] if any(_names_match(targets, path) for path in paths) else [targets]
    return sorted(targets.difference(*(_endings(path) for path in paths)))


def _refuse_other(rule: TargetRule, path: str) -> None:
    is_expert = "experts" in path.split(".")
    what = (
        "a mixture's experts, which only a LoRA changes, by target_parameters"
        if is_expert
        else "not a linear module that every token passes"
    )
    raise UnsupportedAdapter(
        f'field "target_modules" means "{path}", which is {what}. Adapters are served on linear modules; '
        "leave it out of target_modules.",
        field="target_modules",
        value=_plain(rule.targets),
    )


def _plain(names: Names) -> object:
    return names if isinstance(names, str) else sorted(names)
