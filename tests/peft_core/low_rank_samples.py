"""Adapters of the kinds of PEFT that are low-rank additions in other words, made by PEFT itself.

Each sample is one way to train one kind. `CHANGES` says, for a sample, fields of its config that decide what it
computes, with another value each: a decoder that did not read the field would not notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft

from tests.peft_core.tuner_samples import LINEAR_ONLY, WITH_CONV1D, Sample


def _conv1d(config: Any, spread: float = 0.3, *more: str, **fields: Any) -> Sample:
    return Sample(config, fields, (*WITH_CONV1D, *more), spread)


def _linear(config: Any, spread: float = 0.3, *more: str, **fields: Any) -> Sample:
    return Sample(config, fields, (*LINEAR_ONLY, *more), spread)


_ADALORA = {"init_r": 6, "target_r": 4, "lora_alpha": 12, "total_step": 10}
_BANK = {"r": 3, "num_vectors": 12, "vector_length": 16, "topk": 3}
_HEAVY = {"bank": 0.3}  # spreads: the bank's vectors, beside logits of 1

SAMPLES: Mapping[str, Sample] = {
    "adalora": _conv1d(peft.AdaLoraConfig, 0.2, "gemma2", **_ADALORA),
    "adalora, alpha 0": _conv1d(peft.AdaLoraConfig, 0.2, **(_ADALORA | {"lora_alpha": 0})),
    "adalora, biases": _conv1d(peft.AdaLoraConfig, 0.2, "opt", **_ADALORA, bias="all"),
    "loha": _linear(peft.LoHaConfig, 0.3, "phi3", r=3, alpha=6),
    "loha, patterns": _linear(
        peft.LoHaConfig, 0.3, r=3, alpha=6, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 20, "q_proj": 5}
    ),
    "loha, wide": _linear(peft.LoHaConfig, 0.05, r=8, alpha=8),
    "vera": _conv1d(peft.VeraConfig, 0.3, "phi3", "gpt_neox", r=8),
    "vera, drawn": _conv1d(peft.VeraConfig, 0.3, "gemma2", r=8, save_projection=False, projection_prng_key=7),
    "vera, biases and norms": _conv1d(
        peft.VeraConfig, 0.3, "opt", r=8, bias="vera_only", modules_to_save=["norm", "ln_f"]
    ),
    "pvera": _conv1d(peft.PveraConfig, 0.3, "gpt_neox", r=8),
    "pvera, drawn": _conv1d(peft.PveraConfig, 0.3, r=8, save_projection=False, projection_prng_key=7),
    "vblora": _conv1d(peft.VBLoRAConfig, 1.0, "opt", **_BANK)._replace(spreads=_HEAVY),
    "vblora, chosen": _conv1d(peft.VBLoRAConfig, 1.0, **_BANK, save_only_topk_weights=True)._replace(spreads=_HEAVY),
    "vblora, one chosen": _conv1d(
        peft.VBLoRAConfig, 1.0, **(_BANK | {"topk": 1}), save_only_topk_weights=True
    )._replace(spreads=_HEAVY),
    "unilora": _conv1d(peft.UniLoraConfig, 4.0, "phi3", r=4, theta_d_length=100),
    "unilora, indices": _conv1d(peft.UniLoraConfig, 4.0, r=4, theta_d_length=100, save_indices=True),
    "unilora, layers": _linear(peft.UniLoraConfig, 4.0, r=2, theta_d_length=70, layers_to_transform=[0, 2]),
    "unilora, long": _linear(peft.UniLoraConfig, 1.0, r=1, theta_d_length=7000, modules_to_save=["k_proj"]),
    "hra": _linear(peft.HRAConfig, 0.3, "gemma2", r=4),
    "hra, orthogonal": _linear(peft.HRAConfig, 0.3, "opt", r=5, apply_GS=True),
    "miss": _linear(peft.MissConfig, 0.05, "gpt_neox", r=4),
    "miss, padded": _linear(peft.MissConfig, 0.05, r=5),
    "miss, mini": _linear(peft.MissConfig, 0.05, r=4, init_weights="mini", mini_r=2),
    "miss, bat": _linear(peft.MissConfig, 0.05, "opt", r=4, init_weights="bat"),
    "delora": _linear(peft.DeloraConfig, 0.3, "gemma2", r=4, delora_lambda=1),
    "delora, patterns": _linear(
        peft.DeloraConfig, 0.3, r=4, delora_lambda=1, rank_pattern={"q_proj": 2}, lambda_pattern={"v_proj": 3}
    ),
    "gralora": _conv1d(peft.GraloraConfig, 0.1, "phi3", r=4, alpha=8, gralora_k=2),
    "gralora, hybrid": _conv1d(peft.GraloraConfig, 0.1, r=8, alpha=8, gralora_k=4, hybrid_r=3),
    "tinylora": _conv1d(peft.TinyLoraConfig, 0.3, "gpt_neox", r=2, u=5),
    "tinylora, tied": _conv1d(peft.TinyLoraConfig, 0.3, r=2, u=5, weight_tying=0.7),
    "tinylora, drawn": _conv1d(peft.TinyLoraConfig, 0.3, r=2, u=5, save_projection=False, projection_seed=9),
    "tinylora, drawn, layers": _linear(
        peft.TinyLoraConfig,
        0.3,
        r=2,
        u=5,
        save_projection=False,
        layers_to_transform=[1, 2],
        modules_to_save=["up_proj"],
    ),
    "tinylora, tables": Sample(
        peft.TinyLoraConfig,
        {"r": 3, "u": 5, "target_modules": ["embed_tokens", "lm_head", "v_proj"], "save_projection": False},
        ("llama", "qwen2", "opt"),
    ),
    "osf": _linear(peft.OSFConfig, 0.05, "gpt_neox", effective_rank=60),
    "osf, half": _linear(peft.OSFConfig, 0.05),
    "osf, patterns": _linear(peft.OSFConfig, 0.05, effective_rank=0.9, rank_pattern={"mlp": 61, r"\.0\..*q_proj": 0.5}),
    "deft": _conv1d(peft.DeftConfig, 0.1, "gemma2", r=4, alpha=2),
    "deft, no alpha": _conv1d(peft.DeftConfig, 0.1, r=4),
    "deft, qr": _conv1d(peft.DeftConfig, 0.05, r=4, alpha=8, decomposition_method="qr"),
    "deft, para": _conv1d(peft.DeftConfig, 0.05, r=4, para=True, decomposition_method="qr"),
    "psoft": _linear(peft.PsoftConfig, 0.2, "phi3", r=6),
    "psoft, even": _linear(peft.PsoftConfig, 0.2, r=6, ab_svd_init="pissa_init", psoft_alpha=7),
    "psoft, series": _linear(peft.PsoftConfig, 0.2, r=6, use_cayley_neumann=True, cayley_neumann_eps=0.5),
    "psoft, two terms": _linear(peft.PsoftConfig, 0.1, r=6, use_cayley_neumann=True, num_cayley_neumann_terms=2),
    "psoft, three terms": _linear(
        peft.PsoftConfig, 0.1, r=6, use_cayley_neumann=True, num_cayley_neumann_terms=3, psoft_mag_a=False
    ),
    "psoft, seven terms": _linear(
        peft.PsoftConfig, 0.1, r=6, use_cayley_neumann=True, num_cayley_neumann_terms=7, psoft_mag_b=False
    ),
    "psoft, randomised": _linear(peft.PsoftConfig, 0.1, r=6, psoft_svd="lowrank", random_seed=3, psoft_orth=False),
    "peanut": _linear(peft.PeanutConfig, 0.2, "opt", r=4),
    "peanut, deep": _linear(peft.PeanutConfig, 0.2, r=4, depth=2, act_fn="gelu", scaling=0.5),
}

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "adalora": {"lora_alpha": 5},
    "loha": {"alpha": 3},
    "loha, patterns": {"alpha_pattern": {"v_proj": 2, "q_proj": 5}},
    "vera, drawn": {"projection_prng_key": 8},
    "pvera, drawn": {"projection_prng_key": 8},
    "vblora": {"topk": 2},
    "unilora": {"proj_seed": 43},
    "hra": {"apply_GS": True},
    "hra, orthogonal": {"apply_GS": False},
    "gralora": {"alpha": 2},
    "tinylora, drawn": {"projection_seed": 10},
    "deft": {"alpha": 8, "decomposition_method": "qr"},
    "deft, no alpha": {"alpha": 8},
    "psoft": {"use_cayley_neumann": True, "ab_svd_init": "pissa_init"},
    "psoft, series": {"num_cayley_neumann_terms": 3, "use_cayley_neumann": False, "cayley_neumann_eps": 0.1},
    "psoft, randomised": {"random_seed": 4, "psoft_svd_lowrank_niter": 0},
    "peanut, deep": {"scaling": 1.0, "act_fn": "relu"},
}
