"""Every field of a LoRA config: used, irrelevant to what the adapter computes, or refused unless switched off.

The fields are those of PEFT 0.21 (https://huggingface.co/docs/peft/package_reference/lora) and the two that older
versions wrote. A field that is in none of the three tables is refused by the ledger.

Running example: {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "use_rslora": true}
    read_lora_config(...).scaling("model.layers.0.self_attn.q_proj", 16)  -> 32 / sqrt(16) = 8.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_core.errors import MalformedAdapter, shown
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.targets import Names, TargetRule, first_match, first_pattern, require_endings

DEFAULT_ALPHA = 8  # PEFT's, where a config does not say

USED_FIELDS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "ensure_weight_tying",
    "bias",
)

IRRELEVANT_FIELDS: Mapping[str, str] = {
    "auto_mapping": "names Python classes of the training program",
    "corda_config": "only steers an initialisation",
    "eva_config": "only steers an initialisation",
    "fan_in_fan_out": "the stored factors have the same orientation either way",
    "inference_mode": "a switch of training",
    "lora_dropout": "dropout is off at inference",
    "lora_ga_config": "only steers an initialisation",
    "loftq_config": "only steers an initialisation",
    "megatron_config": "describes the training program's parallel layers; the stored factors are whole",
    "megatron_core": "names a Python module of the training program",
    "merge_weights": "where an older PEFT kept the sum; the sum is the same",
    "monteclora_config": "samples during training only",
    "peft_version": "tells who wrote the file",
    "qalora_group_size": "only used where use_qalora is true, which is refused",
    "revision": "the base is checked by its shapes",
    "runtime_config": "never stored with a meaning",
    "velora_config": "changes the backward pass only",
}

REFUSED_FIELDS: Mapping[str, str] = {
    "enable_lora": "adapters of merged projections in the format of PEFT before 0.3 are not served. "
    "Load and save the adapter with a current PEFT.",
    "layer_replication": "it makes another base model with more layers. Serve that model as the base.",
    "lora_bias": "a bias on the up projection is not served yet. Train with lora_bias=False.",
    "modules_to_save": "whole replaced modules are not served yet. Train without modules_to_save.",
    "target_parameters": "adapters on bare parameters (experts) are not served yet. Train on target_modules only.",
    "trainable_token_indices": "replaced embedding rows are not served yet. Train without trainable_token_indices.",
    "use_dora": "DoRA is not served yet. Train with use_dora=False, or merge the adapter into a copy of the base.",
    "use_qalora": "QALoRA pools its input over quantisation groups, which is not served yet. "
    "Train with use_qalora=False.",
}

REFUSED_PARTS: Mapping[str, str] = {  # switched on even by an empty object
    "alora_invocation_tokens": "activated LoRA, which is off before its invocation, is not served yet. "
    "Train a plain LoRA instead.",
    "arrow_config": "Arrow routes each token between several adapters, which cannot be served from one adapter. "
    "Serve the adapters that it routes between.",
    "kasa_config": "KaSA, which changes the base's weights, is not served yet. Train a plain LoRA instead.",
    "use_bdlora": "block-diagonal factors are not served yet. Train a plain LoRA instead.",
}

_PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")  # initialisations that leave the base's weights alone
_CONVERT = "Save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA."
_CHANGED_STARTS: Mapping[str, str] = {
    "pissa": f"PiSSA takes its first factors out of the base's weights; that is not served yet. {_CONVERT}",
    "olora": f"OLoRA takes its first factors out of the base's weights; that is not served yet. {_CONVERT}",
    "corda": f"CorDA takes its first factors out of the base's weights and does not store them. {_CONVERT}",
    "lora_ga": f"LoRA-GA takes its first factors out of the base's weights and does not store them. {_CONVERT}",
    "loftq": "LoftQ changes the base's weights. Save the base that it made, set init_lora_weights to true and "
    "serve the adapter on that base.",
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The fields that decide what a LoRA adapter computes."""

    rule: TargetRule | None  # None: the config names no targets, the file alone decides
    rank: int | None  # None where the config does not say
    alpha: float
    is_rank_stabilised: bool
    ranks: Mapping[str, float]  # pattern -> rank, in file order
    alphas: Mapping[str, float]  # pattern -> alpha, in file order
    starts_random: bool  # a targeted module without tensors would be random, not neutral
    ties_head: bool  # adapts embedding and head together
    base_name: str | None

    def stated_rank(self, path: str) -> float | None:
        """The rank that the config claims for a module; None where it claims nothing."""
        claimed = first_match(self.ranks, path)
        return self.rank if claimed is None else claimed

    def scaling(self, path: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) when rank-stabilised (https://arxiv.org/abs/2312.03732)."""
        stated = first_match(self.alphas, path)
        alpha = self.alpha if stated is None else stated
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def idle_patterns(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Patterns of ranks and alphas that decide for no module: never matched, or always after another."""
        used = {first_pattern(patterns, path) for patterns in (self.ranks, self.alphas) for path in paths}
        return tuple(dict.fromkeys(key for key in (*self.ranks, *self.alphas) if key not in used))


def read_lora_config(ledger: ConfigLedger) -> LoraConfig:
    """Take every field off the ledger and close it.

    Raises:
        UnsupportedAdapter: a field asks for something that is not served, or is unknown.
        MalformedAdapter: a field has the wrong type.
    """
    ledger.use("peft_type")
    ledger.set_aside(IRRELEVANT_FIELDS)
    ledger.refuse_unless_off(REFUSED_FIELDS)
    ledger.refuse_unless_off(REFUSED_PARTS, empty_is_off=False)
    _refuse_other_tasks(ledger)
    _refuse_bias(ledger)
    starts_random = _read_start(ledger)
    ranks, alphas = ledger.use_pattern_values("rank_pattern"), ledger.use_pattern_values("alpha_pattern")
    require_endings("rank_pattern", ranks)
    require_endings("alpha_pattern", alphas)
    base_name = ledger.use("base_model_name_or_path")
    config = LoraConfig(
        rule=_read_rule(ledger),
        rank=ledger.use_count("r"),
        alpha=ledger.use_number("lora_alpha", DEFAULT_ALPHA),
        is_rank_stabilised=ledger.use_flag("use_rslora"),
        ranks=ranks,
        alphas=alphas,
        starts_random=starts_random,
        ties_head=ledger.use_flag("ensure_weight_tying"),
        base_name=base_name if isinstance(base_name, str) and base_name else None,
    )
    ledger.close()
    return config


def _refuse_other_tasks(ledger: ConfigLedger) -> None:
    task = ledger.use("task_type")
    if task not in (None, "CAUSAL_LM"):
        refuse("task_type", task, 'only text generation is served. Train the adapter with task_type "CAUSAL_LM".')


def _refuse_bias(ledger: ConfigLedger) -> None:
    bias = ledger.use("bias", "none")
    if bias != "none":
        refuse("bias", bias, 'replaced biases of the base are not served yet. Train with bias="none".')


def _read_start(ledger: ConfigLedger) -> bool:
    """Whether untrained factors would be random; refuses initialisations that change the base's weights."""
    start = ledger.use("init_lora_weights", True)
    if isinstance(start, bool):
        return not start
    if start in _PLAIN_STARTS:
        return False
    sentence = "this initialisation is unknown here and may change the base's weights."
    if isinstance(start, str) and start.startswith("pissa_niter_"):
        sentence = f"its base weights were made at random and are not stored. {_CONVERT}"
    elif isinstance(start, str):
        sentence = _CHANGED_STARTS.get(start, sentence)
    return refuse("init_lora_weights", start, sentence)


def _read_rule(ledger: ConfigLedger) -> TargetRule | None:
    targets = ledger.use_names("target_modules")
    exclude = ledger.use_names("exclude_modules")
    layers = _read_layers(ledger)
    patterns = _as_tuple(ledger.use_names("layers_pattern"))
    if (isinstance(targets, str) or not targets) and (layers or patterns):
        field, value = ("layers_to_transform", sorted(layers)) if layers else ("layers_pattern", list(patterns))
        refuse(field, value, "layers can only be chosen where target_modules is a list. Say them in its pattern.")
    if patterns and not layers:
        refuse("layers_pattern", list(patterns), "it means nothing without layers_to_transform. Remove it.")
    if not targets:
        if exclude:
            refuse("exclude_modules", exclude, "it means nothing without target_modules. Say both, or neither.")
        return None
    return TargetRule(_as_names(targets), _as_names(exclude), layers, patterns)


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


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _as_names(names: str | tuple[str, ...]) -> Names:
    return names if isinstance(names, str) else frozenset(names)
