"""Adapters of the kinds of PEFT that change modules by other forms than a low-rank addition, made by PEFT itself.

Each sample is one way to train one kind: gains, shifts, rotations, turns, Kronecker products, norms, whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft

from peft_core.methods.report import FormName
from tests.peft_core.tuner_samples import LINEAR_ONLY, WITH_CONV1D, Sample

MORE = ("gemma2", "phi3", "opt", "gpt_neox")
_NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "qwen2": ["input_layernorm", "norm"],
    "qwen3": ["q_norm", "k_norm", "input_layernorm"],
    "gemma2": ["input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "gpt_neox": ["input_layernorm", "final_layer_norm"],
    "phi3": ["input_layernorm", "norm"],
}
_EVERY_LINEAR = r".*(proj|c_attn|c_fc|fc1|fc2|query_key_value|dense|h_to_4h|4h_to_h)"
_ALL_BIASES: Mapping[str, Any] = {"bias": "all"}


def norms_of(arch: str) -> list[str]:
    """Suffixes of norms, as `target_modules` takes them."""
    return list(_NORMS[arch])


def _ia3(**fields: Any) -> Sample:
    return Sample(peft.IA3Config, fields, (*WITH_CONV1D, *MORE))


def _linear(config: Any, spread: float = 0.3, *more: str, everywhere: bool = True, **fields: Any) -> Sample:
    return Sample(config, fields, (*LINEAR_ONLY, *more), spread, everywhere=everywhere)


def _conv1d(config: Any, spread: float = 0.3, *more: str, **fields: Any) -> Sample:
    return Sample(config, fields, (*WITH_CONV1D, *more), spread)


SAMPLES: Mapping[str, Sample] = {
    "ia3": _ia3(feedforward_modules=r".*(down_proj|mlp\.c_proj|fc2|4h_to_h)"),
    "ia3, outputs only": _ia3(feedforward_modules=[]),
    "ia3, endings without a dot": _ia3(target_modules=_EVERY_LINEAR, feedforward_modules=["proj", "_h", "c2"]),
    "ia3, list": _linear(peft.IA3Config, 0.3, "phi3", feedforward_modules=["down_proj"]),
    "beft": _linear(peft.BeftConfig, 0.3, *MORE),
    "oft": _linear(peft.OFTConfig, 0.08, *MORE),
    "oft, number of blocks": _linear(peft.OFTConfig, 0.08, r=8, oft_block_size=0),
    "oft, size adjusted": _linear(peft.OFTConfig, 0.08, oft_block_size=12),
    "oft, exact": _linear(peft.OFTConfig, 0.1, use_cayley_neumann=False),
    "oft, two terms": _linear(peft.OFTConfig, 0.08, num_cayley_neumann_terms=2),
    "oft, three terms": _linear(peft.OFTConfig, 0.08, num_cayley_neumann_terms=3),
    "oft, four terms": _linear(peft.OFTConfig, 0.08, num_cayley_neumann_terms=4),
    "oft, seven terms": _linear(peft.OFTConfig, 0.08, num_cayley_neumann_terms=7),
    "oft, constrained": _linear(peft.OFTConfig, 0.1, coft=True, eps=0.3, use_cayley_neumann=False),
    "oft, shared": _linear(peft.OFTConfig, 0.08, block_share=True),
    "oft, biases": _linear(peft.OFTConfig, 0.08, "opt", **_ALL_BIASES),
    "boft": _linear(peft.BOFTConfig, 0.3, *MORE),
    "boft, size": _linear(peft.BOFTConfig, 0.3, boft_block_size=16),
    "boft, number of blocks": _linear(peft.BOFTConfig, 0.3, boft_block_size=0, boft_block_num=8),
    "boft, biases": _linear(peft.BOFTConfig, 0.3, "opt", bias="boft_only"),
    "road_1": _linear(peft.RoadConfig, 0.4, *MORE, group_size=16),
    "road_2": _linear(peft.RoadConfig, 0.4, "opt", variant="road_2", group_size=32),
    "road_4": _linear(peft.RoadConfig, 0.4, variant="road_4", group_size=8),
    "lokr": _linear(peft.LoKrConfig, 0.2, *MORE, r=8, alpha=16),
    "lokr, low-rank": _linear(peft.LoKrConfig, 0.4, r=2, alpha=3, decompose_both=True, decompose_factor=8),
    "lokr, patterns": _linear(
        peft.LoKrConfig, 0.3, r=8, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 20}
    ),
    "fourierft": _conv1d(peft.FourierFTConfig, 2.0, *MORE, n_frequency=300, scaling=20.0),
    "fourierft, patterns": _conv1d(
        peft.FourierFTConfig,
        2.0,
        n_frequency=300,
        scaling=10.0,
        random_loc_seed=5,
        n_frequency_pattern={"q_proj": 100, "c_attn": 50},
    ),
    "c3a": _linear(peft.C3AConfig, 2.0, *MORE, block_size=16),
    "c3a, patterns": _linear(peft.C3AConfig, 2.0, block_size=32, block_size_pattern={"q_proj": 8}),
    "randlora": _conv1d(peft.RandLoraConfig, 0.02, *MORE, r=12, randlora_alpha=24),
    "randlora, drawn again": _conv1d(
        peft.RandLoraConfig, 0.02, r=8, randlora_alpha=24, save_projection=False, projection_prng_key=7
    ),
    "randlora, sparse": _conv1d(peft.RandLoraConfig, 0.02, r=8, randlora_alpha=8, sparse=True, save_projection=False),
    "randlora, very sparse": _conv1d(
        peft.RandLoraConfig, 0.02, r=8, randlora_alpha=8, very_sparse=True, save_projection=False
    ),
    "hira": _conv1d(peft.HiraConfig, 0.3, *MORE, r=4),
    "hira, patterns": _conv1d(peft.HiraConfig, 0.3, r=4, rank_pattern={"q_proj": 2, "c_attn": 7}),
    "shira": _linear(peft.ShiraConfig, 0.1, *MORE, r=4),
    "supertuning": _linear(peft.SupertuningConfig, 0.2, *MORE, sparsity=0.9),
    "supertuning, lora": _linear(peft.SupertuningConfig, 0.2, sparsity=0.95, r=4, lora_alpha=2.0),
    "supertuning, chosen again": _linear(peft.SupertuningConfig, 0.2, sparsity=0.95, save_precomputed_indices=False),
    "supertuning, smallest": _linear(
        peft.SupertuningConfig, 0.2, sparsity=0.95, select_top=False, save_precomputed_indices=False
    ),
    "waveft": _conv1d(peft.WaveFTConfig, 0.05, *MORE, n_frequency=400, scaling=5.0),
    "waveft, proportional": _conv1d(
        peft.WaveFTConfig, 0.05, n_frequency=400, scaling=5.0, proportional_parameters=True, wavelet_family="db3"
    ),
    "waveft, no transform": _conv1d(peft.WaveFTConfig, 0.05, n_frequency=400, scaling=5.0, use_idwt=False),
    "waveft, patterns": _conv1d(
        peft.WaveFTConfig,
        0.05,
        n_frequency=400,
        scaling=5.0,
        wavelet_family="sym4",
        n_frequency_pattern={"q_proj": 90, "c_attn": 77},
    ),
    "glora": _linear(peft.GloraConfig, 0.2, *MORE, r=4),
    "glora, vectors": _linear(
        peft.GloraConfig, 0.02, "opt", r=4, config_A_B="vector", config_C="vector", config_D_E="vector"
    ),
    "glora, constants": _linear(peft.GloraConfig, 0.02, "opt", config_A_B="constant", config_C="none"),
    "glora, biases only": Sample(
        peft.GloraConfig, {"config_A_B": "none", "config_D_E": "vector", "r": 3}, ("qwen2", "opt"), 0.1
    ),
    "frod": _conv1d(peft.FrodConfig, 0.1, *MORE, progressbar=False, sparse_rate=0.05),
}

FORMS: Mapping[str, set[FormName]] = {
    "ia3": {"gain", "input gain"},
    "beft": {"shift"},
    "oft": {"rotation"},
    "boft": {"rotation", "gain", "shift"},
    "road_1": {"turn"},
    "lokr": {"kron"},
    "fourierft": {"dense"},
    "glora, vectors": {"gain", "low rank", "shift"},
    "frod": {"replacement"},
}
NEEDS_BASE = {"hira", "hira, patterns", "glora", "frod", "supertuning, chosen again", "supertuning, smallest"}
