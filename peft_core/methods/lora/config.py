"""Every field of a LoRA config: used, irrelevant to what the adapter computes, or refused unless switched off.

The fields are those of PEFT 0.21 (https://huggingface.co/docs/peft/package_reference/lora) and the few that older
versions wrote. A field that is in none of the tables is refused by the ledger.

Running example: {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "use_rslora": true}
    read_lora_config(...).scaling("model.layers.0.self_attn.q_proj", 16)  -> 32 / sqrt(16) = 8.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peft_core.errors import MalformedAdapter, shown
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.tuner.config import COMMON_FIELDS, COMMON_IRRELEVANT, TunerConfig, read_tuner_config

DEFAULT_ALPHA = 8  # PEFT's, where a config does not say
DEFAULT_POOL = 16  # PEFT's qalora_group_size
BIASES = ("all", "lora_only")

USED_FIELDS = (
    *COMMON_FIELDS,
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "lora_bias",
    "use_dora",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
    "qalora_group_size",
    "alora_invocation_tokens",
    "target_parameters",
)

IRRELEVANT_FIELDS: Mapping[str, str] = {
    **COMMON_IRRELEVANT,
    "corda_config": "only steers an initialisation",
    "eva_config": "only steers an initialisation",
    "lora_dropout": "dropout is off at inference",
    "lora_ga_config": "only steers an initialisation",
    "loftq_config": "only steers an initialisation",
    "megatron_config": "describes the training program's parallel layers; the stored factors are whole",
    "megatron_core": "names a Python module of the training program",
    "merge_weights": "where an older PEFT kept the sum; the sum is the same",
    "monteclora_config": "samples during training only",
    "runtime_config": "never stored with a meaning",
    "velora_config": "changes the backward pass only",
}

REFUSED_FIELDS: Mapping[str, str] = {
    "enable_lora": "adapters of merged projections in the format of PEFT before 0.3 are not served. "
    "Load and save the adapter with a current PEFT.",
    "invocation_string": "the first activated LoRAs named their invocation by its text. Save the adapter with "
    "alora_invocation_tokens, the text's token ids.",
    "layer_replication": "it makes another base model with more layers. Serve that model as the base.",
}

REFUSED_PARTS: Mapping[str, str] = {  # switched on even by an empty object
    "arrow_config": "Arrow routes each token between several adapters, which cannot be served from one adapter. "
    "Serve the adapters that it routes between.",
}

Start = Literal["plain", "random", "pissa", "olora"]
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")  # initialisations that leave the base's weights alone
_CONVERT = "Save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA."
_CHANGED_STARTS: Mapping[str, str] = {
    "corda": f"CorDA takes its first factors out of the base's weights and does not store them. {_CONVERT}",
    "lora_ga": f"LoRA-GA takes its first factors out of the base's weights and does not store them. {_CONVERT}",
    "loftq": "LoftQ changes the base's weights. Save the base that it made, set init_lora_weights to true and "
    "serve the adapter on that base.",
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Factors stored as their diagonal blocks (BD-LoRA), by parts of paths."""

    num_blocks: int
    of_down: tuple[str, ...]
    of_up: tuple[str, ...]

    def side(self, path: str) -> Literal["down", "up"] | None:
        """Which factor of a module is block-diagonal."""
        if any(part in path for part in self.of_down):
            return "down"
        return "up" if any(part in path for part in self.of_up) else None


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The fields that decide what a LoRA adapter computes."""

    common: TunerConfig
    rank: int | None = None  # None where the config does not say
    alpha: float = DEFAULT_ALPHA
    is_rank_stabilised: bool = False
    start: Start = "plain"  # "random": a targeted module without tensors would be random, not neutral
    has_magnitudes: bool = False  # DoRA
    has_bias: bool = False  # of the up projection
    has_diagonal: bool = False  # KaSA
    blocks: Blocks | None = None  # BD-LoRA
    pool: int = 1  # QALoRA: neighbouring inputs that are averaged
    invocation_tokens: tuple[int, ...] = ()  # aLoRA
    parameters: tuple[str, ...] = ()  # targeted without their modules: whole paths, or the ends of paths

    @property
    def changes_base(self) -> bool:
        """Whether it was trained on other weights than the base's: they come out as further ranks."""
        return self.has_diagonal or self.start in ("pissa", "olora")

    def stated_rank(self, path: str) -> float | None:
        """The rank that the config claims for a module; None where it claims nothing."""
        return self.common.rank(path, self.rank)

    def scaling(self, path: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) when rank-stabilised (https://arxiv.org/abs/2312.03732)."""
        return self.common.alpha(path, self.alpha) / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def read_lora_config(ledger: ConfigLedger) -> LoraConfig:
    """Take every field off the ledger and close it.

    Raises:
        UnsupportedAdapter: a field asks for something that is not served, or is unknown.
        MalformedAdapter: a field has the wrong type.
    """
    common = read_tuner_config(ledger, has_patterns=True, biases=BIASES)
    ledger.set_aside(IRRELEVANT_FIELDS)
    ledger.refuse_unless_off(REFUSED_FIELDS)
    ledger.refuse_unless_off(REFUSED_PARTS, empty_is_off=False)
    config = LoraConfig(
        common=common,
        rank=ledger.use_count("r"),
        alpha=ledger.use_number("lora_alpha", DEFAULT_ALPHA),
        is_rank_stabilised=ledger.use_flag("use_rslora"),
        start=_read_start(ledger),
        has_magnitudes=ledger.use_flag("use_dora"),
        has_bias=ledger.use_flag("lora_bias"),
        has_diagonal=_use_part(ledger, "kasa_config", ("beta", "gamma")) is not None,
        blocks=_read_blocks(ledger),
        pool=_read_pool(ledger),
        invocation_tokens=_read_invocation(ledger),
        parameters=ledger.use_list("target_parameters"),
    )
    _refuse_together(config)
    ledger.close()
    return config


def _read_start(ledger: ConfigLedger) -> Start:
    """What training began with; refuses initialisations that change the base's weights beyond recovery."""
    start = ledger.use("init_lora_weights", True)
    if isinstance(start, bool):
        return "plain" if start else "random"
    if start in _PLAIN_STARTS:
        return "plain"
    if start == "pissa":
        return "pissa"
    if isinstance(start, str) and start.lower() == "olora":
        return "olora"
    sentence = "this initialisation is unknown here and may change the base's weights."
    if isinstance(start, str) and start.startswith("pissa_niter_"):
        sentence = f"its base weights were made at random and are not stored. {_CONVERT}"
    elif isinstance(start, str):
        sentence = _CHANGED_STARTS.get(start, sentence)
    return refuse("init_lora_weights", start, sentence)


def _use_part(ledger: ConfigLedger, field: str, known: tuple[str, ...]) -> dict[str, Any] | None:
    """Take a field that is an object, even an empty one, of known fields; None where it is absent or false."""
    value = ledger.use(field)
    if value is None or value is False:
        return None
    if isinstance(value, dict) and set(value) <= set(known):
        return value
    raise MalformedAdapter(
        f'field "{field}" = {shown(value)}; expected an object with {", ".join(known)}. Correct adapter_config.json.',
        field=field,
        value=value,
    )


def _read_blocks(ledger: ConfigLedger) -> Blocks | None:
    fields = ("nblocks", "target_modules_bd_a", "target_modules_bd_b", "match_strict")  # the last checks a training
    value = _use_part(ledger, "use_bdlora", fields)
    if value is None:
        return None
    part = ConfigLedger(value)
    num_blocks = part.use_count("nblocks") or 1
    return Blocks(num_blocks, part.use_list("target_modules_bd_a"), part.use_list("target_modules_bd_b"))


def _read_pool(ledger: ConfigLedger) -> int:
    is_pooled, size = ledger.use_flag("use_qalora"), ledger.use_count("qalora_group_size")
    return (size or DEFAULT_POOL) if is_pooled else 1


def _read_invocation(ledger: ConfigLedger) -> tuple[int, ...]:
    tokens = ledger.use("alora_invocation_tokens", [])
    if tokens is False:
        return ()
    if isinstance(tokens, list | tuple) and all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
        return tuple(tokens)
    raise MalformedAdapter(
        f'field "alora_invocation_tokens" = {shown(tokens)}; expected a list of token ids. '
        "Correct adapter_config.json.",
        field="alora_invocation_tokens",
        value=tokens,
    )


def _refuse_together(config: LoraConfig) -> None:
    """PEFT has one variant an adapter; what several of them would mean together is nobody's definition."""
    variants = {
        "use_dora": config.has_magnitudes,
        "use_bdlora": config.blocks is not None,
        "use_qalora": config.pool > 1,
        "kasa_config": config.has_diagonal,
        "alora_invocation_tokens": bool(config.invocation_tokens),
    }
    chosen = [field for field, is_on in variants.items() if is_on]
    if config.start in ("pissa", "olora") and chosen not in ([], ["use_dora"]):
        chosen.append("init_lora_weights")
    if config.has_bias and (config.has_magnitudes or config.changes_base):
        chosen = ["lora_bias", "use_dora" if config.has_magnitudes else "init_lora_weights"]
    if len(chosen) > 1:
        refuse(chosen[0], True, f"together with {chosen[1]} it has no meaning in PEFT. Train with one of them.")
