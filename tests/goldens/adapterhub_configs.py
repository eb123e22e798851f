"""Which adapters the goldens of AdapterHub hold: every configuration that is served, for the bases where it differs."""

from __future__ import annotations

from typing import Any

import adapters  # type: ignore[import-not-found]


def configs(base: str) -> dict[str, Any]:
    """Name -> a configuration of the library, for adapters that are served."""
    if base == "llama":
        return _bottlenecks() | _norms() | _residuals() | _hypercomplex() | _activations() | _low_rank() | _prefixes()
    if base == "mistral":
        few = ("seq_bn", "par_bn", "lora", "ia3", "prefix", "mam")
        return {name: config for name, config in configs("llama").items() if name in few}
    if base == "gpt2":
        return _bottlenecks() | _norms() | _residuals() | _compacters() | _merged_low_rank() | _prefixes()
    if base == "qwen2":
        served = {name: config for name, config in _residuals().items() if name == "counted_twice"}
        return _bottlenecks() | _norms() | served | _compacters() | _low_rank()
    if base == "gemma2":
        return _bottlenecks() | {"ln_after": _norms()["ln_after"]} | _compacters() | {"lora": _low_rank()["lora"]}
    everything = _bottlenecks() | _low_rank() | _residuals() | _prefixes() | _beside()
    return {name: everything[name] for name in _FEW[base]}


_FEW = {
    "qwen3": ("seq_both", "par_bn", "lora"),
    "gemma3": ("seq_bn", "double_seq_bn", "seq_both", "par_bn"),
    "phi": ("seq_both", "double_seq_bn", "counted_twice", "par_attention", "lora", "ia3"),
    "gptj": ("seq_attention", "double_seq_bn", "par_attention", "lora", "ia3", "prefix"),
}


def refused_configs() -> dict[str, Any]:
    """Name -> a configuration of the library, for adapters (of the llama base) that are refused."""
    return {
        "gated": adapters.SeqBnConfig(use_gating=True, reduction_factor=8),
        "unipelt": adapters.UniPELTConfig(adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=8)),
        "gated_lora": adapters.LoRAConfig(r=2, use_gating=True),
        "invertible": adapters.SeqBnInvConfig(reduction_factor=8),
        "loreft": adapters.LoReftConfig(),
        "norm_of_everything": adapters.SeqBnConfig(
            reduction_factor=8, ln_after=True, adapter_residual_before_ln=True, residual_before_ln=False
        ),
        "prefix_left_out": adapters.PrefixTuningConfig(flat=True, prefix_length=3, leave_out=[1]),
    }


def _bottlenecks() -> dict[str, Any]:
    return {
        "seq_bn": adapters.SeqBnConfig(reduction_factor=8),
        "seq_both": adapters.SeqBnConfig(reduction_factor=8, mh_adapter=True),
        "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=8),
        "par_bn": adapters.ParBnConfig(reduction_factor=4),
        "scaled_par_bn": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
        "per_layer": adapters.SeqBnConfig(reduction_factor={"0": 4, "default": 16}, leave_out=[1]),
    }


def _beside() -> dict[str, Any]:
    """For attention alone, where the feed-forward block stands beside it."""
    return {
        "seq_attention": adapters.SeqBnConfig(reduction_factor=8, mh_adapter=True, output_adapter=False),
        "par_attention": adapters.ParBnConfig(reduction_factor=8, mh_adapter=True, output_adapter=False),
    }


def _norms() -> dict[str, Any]:
    return {
        "ln_before": adapters.DoubleSeqBnConfig(reduction_factor=8, ln_before=True),
        "ln_before_sum": adapters.SeqBnConfig(reduction_factor=8, ln_before=True),
        "ln_after": adapters.DoubleSeqBnConfig(reduction_factor=8, ln_after=True),
        "ln_after_residual": adapters.DoubleSeqBnConfig(
            reduction_factor=8, ln_after=True, adapter_residual_before_ln=True
        ),
        "par_bn_norms": adapters.ParBnConfig(reduction_factor=4, ln_before=True, ln_after=True),
    }


def _residuals() -> dict[str, Any]:
    return {
        "counted_twice": adapters.SeqBnConfig(reduction_factor=8, mh_adapter=True, residual_before_ln=False),
        "no_original": adapters.SeqBnConfig(reduction_factor=8, original_ln_after=False),
        "no_original_norm": adapters.SeqBnConfig(
            reduction_factor=8, original_ln_after=False, ln_after=True, adapter_residual_before_ln=True
        ),
        "par_no_original": adapters.ParBnConfig(reduction_factor=8, original_ln_after=False),
        "adapter_plus": adapters.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
    }


def _compacters() -> dict[str, Any]:
    return {
        "compacter": adapters.CompacterConfig(reduction_factor=4),
        "compacter_pp": adapters.CompacterPlusPlusConfig(reduction_factor=4),
    }


def _hypercomplex() -> dict[str, Any]:
    plain = adapters.CompacterPlusPlusConfig
    return _compacters() | {
        "phm_shared": plain(reduction_factor=4, shared_W_phm=True, factorized_phm_rule=True),
        "phm_own_rule": plain(reduction_factor=4, shared_phm_rule=False, factorized_phm_W=False, phm_bias=False),
        "phm_own_factors": plain(
            reduction_factor=8, phm_dim=2, phm_rank=2, shared_phm_rule=False, factorized_phm_rule=True
        ),
    }


def _activations() -> dict[str, Any]:
    names = ("gelu", "gelu_new", "silu", "tanh", "sigmoid", "leakyrelu", "linear")
    return {f"act_{name}": adapters.SeqBnConfig(reduction_factor=16, non_linearity=name) for name in names}


def _low_rank() -> dict[str, Any]:
    everywhere = {"intermediate_lora": True, "output_lora": True}
    return {
        "lora": adapters.LoRAConfig(r=4, alpha=12, attn_matrices=["q", "k", "v"], **everywhere),
        "lora_left_out": adapters.LoRAConfig(r=2, alpha=8, leave_out=[0, 2]),
        "ia3": adapters.IA3Config(output_lora=True),
        "ia3_alpha": adapters.IA3Config(alpha=2),
        "dora": adapters.DoRAConfig(r=4, alpha=12, attn_matrices=["q", "k", "v"], **everywhere),
        "vera": adapters.VeraConfig(r=4, alpha=6, attn_matrices=["k", "v"]),
        "dvora": adapters.DvoRAConfig(r=4, alpha=6, attn_matrices=["q"]),
        "union": adapters.ConfigUnion(
            adapters.LoRAConfig(r=2, alpha=4, attn_matrices=["q"], intermediate_lora=True),
            adapters.SeqBnConfig(reduction_factor=8),
        ),
    }


def _merged_low_rank() -> dict[str, Any]:
    return {
        "lora": adapters.LoRAConfig(r=4, alpha=12),
        "lora_k": adapters.LoRAConfig(r=2, alpha=3, attn_matrices=["k"], intermediate_lora=True, output_lora=True),
        "lora_qkv": adapters.LoRAConfig(r=2, alpha=4, attn_matrices=["v", "q", "k"], leave_out=[1]),
        "ia3": adapters.IA3Config(output_lora=True),
        "ia3_alpha": adapters.IA3Config(alpha=2, attn_matrices=["q"]),
        "vera": adapters.VeraConfig(r=4, alpha=6, selfattn_lora=False, output_lora=True),
    }


def _prefixes() -> dict[str, Any]:
    prefix = adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=8)
    return {
        "prefix": prefix,
        "prefix_flat": adapters.PrefixTuningConfig(prefix_length=3, flat=True),
        "mam": adapters.MAMConfig(prefix, adapters.ParBnConfig(reduction_factor=8)),
    }
