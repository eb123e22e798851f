"""The fields that the configs of PEFT's tuners have in common, read once for all kinds.

    where      target_modules, exclude_modules, layers_to_transform, layers_pattern
    how much   rank_pattern, alpha_pattern                     only for kinds that have them
    besides    modules_to_save, bias, trainable_token_indices, ensure_weight_tying
    who        base_model_name_or_path, task_type, peft_type

Running example: {"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    read_tuner_config(ledger) -> TunerConfig(rule=TargetRule({"q_proj"}), modules_to_save=("norm",), ...)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_core.errors import MalformedAdapter, shown
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.targets import Names, TargetRule, first_match, first_pattern, require_endings
from peft_core.spec import BaseModelSpec

COMMON_FIELDS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "trainable_token_indices",
    "ensure_weight_tying",
)

COMMON_IRRELEVANT: Mapping[str, str] = {  # in the config of every PEFT kind
    "auto_mapping": "names Python classes of the training program",
    "fan_in_fan_out": "the stored factors have the same orientation either way",
    "inference_mode": "a switch of training",
    "peft_version": "tells who wrote the file",
    "revision": "the base is checked by its shapes",
}

MAX_NAMED = 5  # of many modules, as many are named in a sentence


@dataclass(frozen=True, slots=True)
class TunerConfig:
    rule: TargetRule | None  # None: the config names no targets, the file alone decides
    ranks: Mapping[str, float] = field(default_factory=dict)  # pattern -> rank, in file order
    alphas: Mapping[str, float] = field(default_factory=dict)  # pattern -> alpha, in file order
    modules_to_save: tuple[str, ...] = ()  # whole paths, or the ends of paths
    bias: str = "none"  # "none", "all", or "<kind>_only": which biases were trained
    token_indices: Mapping[str | None, tuple[int, ...]] = field(default_factory=dict)  # by name; None: the input table
    ties_weights: bool = False  # embedding and head are changed together
    base_name: str | None = None

    def rank(self, path: str, default: float | None) -> float | None:
        """The rank that the config claims for a module."""
        stated = first_match(self.ranks, path)
        return default if stated is None else stated

    def alpha(self, path: str, default: float) -> float:
        stated = first_match(self.alphas, path)
        return default if stated is None else stated

    def idle_patterns(self, paths: Collection[str]) -> tuple[str, ...]:
        """Patterns of ranks and alphas that decide for no module: never matched, or always after another."""
        used = {first_pattern(patterns, path) for patterns in (self.ranks, self.alphas) for path in paths}
        return tuple(dict.fromkeys(key for key in (*self.ranks, *self.alphas) if key not in used))

    def other_base(self, spec: BaseModelSpec) -> str | None:
        """A sentence where the adapter names another base than this one."""
        if self.base_name is None or spec.name is None or _short(self.base_name) == _short(spec.name):
            return None
        return (
            f'The adapter says that it was trained on "{self.base_name}"; this base is "{spec.name}". '
            "Its tensors fit this base."
        )

    def warnings(
        self, spec: BaseModelSpec, adapted: Collection[str], missing: Collection[str], *, has_targets: bool
    ) -> Iterator[str]:
        """Where config, file and base do not quite agree.

        Args:
            adapted: paths, as patterns of ranks and alphas match them.
            missing: paths that are targeted, but have no tensors.
            has_targets: whether the config says at all what is adapted.
        """
        if (sentence := self.other_base(spec)) is not None:
            yield sentence
        if not has_targets:
            yield "The config names no target_modules: every module with tensors in the file is adapted."
        if missing:
            yield f"The config targets {some(missing)}, for which the file has no tensors: left as in the base."
        if idle := self.idle_patterns(adapted):
            yield f"Entries of rank_pattern or alpha_pattern that decide for no module: {some(idle)}."


def read_tuner_config(
    ledger: ConfigLedger, *, has_patterns: bool = False, biases: Collection[str] = ("none",)
) -> TunerConfig:
    """Take the common fields off the ledger; the kind's own fields, and `close`, are left to the kind.

    Args:
        has_patterns: whether the kind has rank_pattern and alpha_pattern.
        biases: values of `bias` that the kind serves: "all", "lora_only", ...

    Raises:
        UnsupportedAdapter: a field asks for something that is not served.
        MalformedAdapter: a field has the wrong type, or a pattern is none.
    """
    base_name = read_origin(ledger)
    saved = ledger.use_list("modules_to_save")
    return TunerConfig(
        rule=_read_rule(ledger, saved),
        ranks=_read_patterns(ledger, "rank_pattern") if has_patterns else {},
        alphas=_read_patterns(ledger, "alpha_pattern") if has_patterns else {},
        modules_to_save=saved,
        bias=_read_bias(ledger, biases),
        token_indices=read_token_indices(ledger, "trainable_token_indices"),
        ties_weights=ledger.use_flag("ensure_weight_tying"),
        base_name=base_name,
    )


def read_origin(ledger: ConfigLedger) -> str | None:
    """Take what every config of PEFT says about where the adapter comes from; returns the name of its base.

    Raises:
        UnsupportedAdapter: it was trained for something else than to generate text.
    """
    ledger.use("peft_type")
    ledger.set_aside(COMMON_IRRELEVANT)
    task, base_name = ledger.use("task_type"), ledger.use("base_model_name_or_path")
    if task not in (None, "CAUSAL_LM"):
        refuse("task_type", task, 'only text generation is served. Train the adapter with task_type "CAUSAL_LM".')
    return base_name if isinstance(base_name, str) and base_name else None


def read_token_indices(ledger: ConfigLedger, field: str) -> dict[str | None, tuple[int, ...]]:
    """Token ids by the name of their table; a plain list means the input embedding, named None.

    Raises:
        MalformedAdapter: something is no token id, or stands twice.
    """
    value: Any = ledger.use(field, {})
    tables: Any = {None: value} if isinstance(value, list | tuple) and value else value
    if not tables:
        return {}
    if isinstance(tables, dict) and all(_are_token_ids(ids) for ids in tables.values()):
        return {name: tuple(ids) for name, ids in tables.items() if ids}
    raise MalformedAdapter(
        f'field "{field}" = {shown(value)}; expected a list of different token ids, or an object of such lists. '
        "Correct adapter_config.json.",
        field=field,
        value=value,
    )


def some(names: Collection[str]) -> str:
    """A few of many names, for a sentence."""
    named = ", ".join(list(names)[:MAX_NAMED])
    return named if len(names) <= MAX_NAMED else f"{named} and {len(names) - MAX_NAMED} more"


def _are_token_ids(ids: object) -> bool:
    if not isinstance(ids, list | tuple) or len(set(map(str, ids))) < len(ids):
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids)


def _read_bias(ledger: ConfigLedger, served: Collection[str]) -> str:
    bias = ledger.use("bias", "none")
    if bias == "none" or bias in tuple(served):
        return str(bias)
    return refuse("bias", bias, f"served here: {', '.join(sorted({'none', *served}))}. Train with one of them.")


def _read_patterns(ledger: ConfigLedger, field: str) -> dict[str, float]:
    patterns = ledger.use_pattern_values(field)
    require_endings(field, patterns)
    return patterns


def _read_rule(ledger: ConfigLedger, saved: tuple[str, ...]) -> TargetRule | None:
    targets = ledger.use_names("target_modules")
    exclude = ledger.use_names("exclude_modules")
    layers = _read_layers(ledger)
    patterns = ledger.use_list("layers_pattern")
    if (isinstance(targets, str) or not targets) and (layers or patterns):
        field, value = ("layers_to_transform", sorted(layers)) if layers else ("layers_pattern", list(patterns))
        refuse(field, value, "layers can only be chosen where target_modules is a list. Say them in its pattern.")
    if patterns and not layers:
        refuse("layers_pattern", list(patterns), "it means nothing without layers_to_transform. Remove it.")
    if not targets:
        if exclude:
            refuse("exclude_modules", exclude, "it means nothing without target_modules. Say both, or neither.")
        return None
    return TargetRule(_as_names(targets), _as_names(exclude), layers, patterns, saved)


def _read_layers(ledger: ConfigLedger) -> frozenset[int]:
    value: Any = ledger.use("layers_to_transform", [])
    layers = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):
        return frozenset(layers)
    raise MalformedAdapter(
        f'field "layers_to_transform" = {shown(value)}; expected a layer number or a list of them. '
        "Correct adapter_config.json.",
        field="layers_to_transform",
        value=value,
    )


def _short(name: str) -> str:
    """A base's name without its owner, its case and the quantisation that it was trained in."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"(-unsloth)?-bnb-4bit$|-(gptq|awq)(-int[48])?$", "", last)


def _as_names(names: str | tuple[str, ...]) -> Names:
    return names if isinstance(names, str) else frozenset(names)
