"""AdaLoRA (https://arxiv.org/abs/2303.10512): a low-rank addition whose ranks were pruned during training.

    base_model.model.<path>.lora_A   [rank, in_features]        no ".weight" here
    base_model.model.<path>.lora_B   [out_features, rank]
    base_model.model.<path>.lora_E   [rank, 1]                  the singular values

    Semantics:
        y += scaling * lora_B (lora_E * (lora_A x)),   scaling = lora_alpha / (init_r + 1e-5)

The divisor is the rank before pruning; with lora_alpha at or below 0 it cancels. The file holds what pruning left of
each module, perhaps nothing.

Running example: init_r = 6, lora_alpha = 12, four of six ranks left
    LinearDelta(down=lora_A * lora_E [4, in], up=12 / 6.00001 * lora_B [out, 4])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_core.errors import MalformedAdapter, shown
from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "ADALORA"
SUFFIXES = ("lora_A", "lora_B", "lora_E")
_DEFAULT_RANK = 12
_DEFAULT_ALPHA = 8
_EPSILON = 1e-5

_SCHEDULE = "only steers the pruning during training"
_START = "only steers an initialisation that AdaLoRA does not have"
_IRRELEVANT: Mapping[str, str] = {
    "alpha_pattern": "AdaLoRA never reads it",
    "beta1": _SCHEDULE,
    "beta2": _SCHEDULE,
    "corda_config": _START,
    "deltaT": _SCHEDULE,
    "eva_config": _START,
    "loftq_config": _START,
    "lora_dropout": "dropout is off at inference",
    "lora_ga_config": _START,
    "megatron_config": "describes the training program's parallel layers; the stored factors are whole",
    "megatron_core": "names a Python module of the training program",
    "monteclora_config": "samples during training only",
    "orth_reg_weight": _SCHEDULE,
    "qalora_group_size": "only used where use_qalora is true, which is refused",
    "r": "AdaLoRA has init_r in its place",
    "runtime_config": "never stored with a meaning",
    "target_r": _SCHEDULE,
    "tfinal": _SCHEDULE,
    "tinit": _SCHEDULE,
    "total_step": _SCHEDULE,
    "use_rslora": "AdaLoRA never reads it",
    "velora_config": "changes the backward pass only",
}
_OF_LORA = "AdaLoRA inherits this field from LoRA and ignores it, so nobody knows what was meant. Switch it off."
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


def plan_adalora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about an AdaLoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "lora_only"))
    init_rank = ledger.use_count("init_r") or _DEFAULT_RANK
    alpha = ledger.use_number("lora_alpha", _DEFAULT_ALPHA)
    start = ledger.use("init_lora_weights", True)
    if not isinstance(start, bool):
        refuse("init_lora_weights", start, "AdaLoRA knows true and false only. Correct adapter_config.json.")
    kept = _kept_ranks(ledger)
    ledger.set_aside(_IRRELEVANT)
    ledger.refuse_unless_off(dict.fromkeys(_REFUSED, _OF_LORA))
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=SUFFIXES, irrelevant=("ranknum",))
    scaling = (alpha if alpha > 0 else float(init_rank)) / (init_rank + _EPSILON)

    def match(site: Site, names: Names) -> MatchedSite | None:
        require_all(names, site.path, SUFFIXES)
        rank = header[names["lora_A"]].shape[0] if header[names["lora_A"]].shape else 0
        shape_of(header, names["lora_A"], site, (rank, "in"))
        shape_of(header, names["lora_B"], site, ("out", rank))
        shape_of(header, names["lora_E"], site, (rank, 1))
        stated = kept.get(site.path, init_rank)
        if rank != stated:
            raise MalformedAdapter(
                f'tensor "{names["lora_A"]}" has rank {rank} (its rows), but the config leaves {stated} of {init_rank} '
                "for this module. Correct init_r or rank_pattern, or save the adapter again.",
                tensor=names["lora_A"],
            )
        return MatchedSite(site.path, rank, scaling) if rank else None

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=start is False)
    return draft.plan(match, _factors)


def _factors(data: SiteData) -> LinearDelta:
    own = data.own
    return LinearDelta(down=own["lora_A"] * own["lora_E"], up=own["lora_B"] * data.matched.scaling)


def _kept_ranks(ledger: ConfigLedger) -> dict[str, int]:
    """How many ranks pruning left, by module path; `rank_pattern` says true or false for each of the first ranks."""
    pattern = ledger.use("rank_pattern", {})
    if not isinstance(pattern, dict) or not all(_is_mask(mask) for mask in pattern.values()):
        raise MalformedAdapter(
            f'field "rank_pattern" = {shown(pattern)}; expected lists of true and false by the name of a tensor. '
            "Correct adapter_config.json.",
            field="rank_pattern",
            value=pattern,
        )
    return {_path_of(name): sum(mask) for name, mask in pattern.items()}


def _is_mask(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(flag, bool) for flag in value)


def _path_of(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.lora_E`, perhaps with the adapter's name after it, without what follows."""
    return name.removeprefix("base_model.model.").partition(".lora_E")[0]
