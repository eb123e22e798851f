"""Tiny random causal LMs of many architectures, and real PEFT adapters for them.

Pure functions without state: the same arguments give the same weights. Three layers, hidden
64, heads of 16 dimensions (4 query heads, 2 key/value heads where the architecture has GQA),
vocabulary 256, 2,048 positions, float32, eval mode. Weights are scaled so that logits have a
spread of about 2 to 5: differences that matter are then visible far above rounding.

No end-of-sequence token is set, so greedy generation always runs to its full length.
Windows of sliding attention are 32 tokens, so that ordinary prompts leave them.

    model = make_model("qwen2", seed=1)
    path = make_lora(model, tmp_path / "sql", rank=4, alpha=8, targets=["q_proj", "v_proj"], seed=2)
    oracle = load_oracle(model, path)            # a PeftModel over a copy; `model` stays as it is
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

HIDDEN = 64
HEAD_DIM = 16
NUM_LAYERS = 3
VOCAB = 256
MAX_POSITION = 2048
_LOGIT_SPREAD = 3.0  # standard deviation of logits
_TIED_GAIN = 0.25  # of tied embeddings; large ones would only repeat the input token

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": HIDDEN // HEAD_DIM,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": MAX_POSITION,
}
# For architectures without GQA: PEFT believes the field wherever a configuration has it.
_EQUAL_HEADS = {name: value for name, value in _LLAMA_LIKE.items() if name != "num_key_value_heads"}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
_WINDOW: dict[str, Any] = {"sliding_window": 32}
_MIXED_WINDOW: dict[str, Any] = {
    **_WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": HEAD_DIM,
}
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")

# architecture -> (model_type, config values, attention linears, feed-forward linears)
_SHAPES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "llama": ("llama", _LLAMA_LIKE, _QKVO, _GATED),
    "qwen2": ("qwen2", _LLAMA_LIKE, _QKVO, _GATED),
    "qwen3": ("qwen3", _LLAMA_LIKE, _QKVO, _GATED),
    "mistral": ("mistral", _LLAMA_LIKE | _WINDOW, _QKVO, _GATED),
    "gemma2": ("gemma2", _LLAMA_LIKE | _MIXED_WINDOW, _QKVO, _GATED),
    "gemma3": ("gemma3_text", _LLAMA_LIKE | _MIXED_WINDOW, _QKVO, _GATED),
    "phi3": ("phi3", _LLAMA_LIKE | {"sliding_window": None}, ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
    "gpt2": (
        "gpt2",
        {"n_embd": HIDDEN, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": MAX_POSITION, "vocab_size": VOCAB},
        ("c_attn", "attn.c_proj"),
        ("c_fc", "mlp.c_proj"),
    ),
    "opt": (
        "opt",
        _EQUAL_HEADS | {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN},
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("fc1", "fc2"),
    ),
    "gpt_neox": ("gpt_neox", _EQUAL_HEADS, ("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")),
    "olmo2": ("olmo2", _LLAMA_LIKE, _QKVO, _GATED),
    "mixtral": ("mixtral", _LLAMA_LIKE | _EXPERTS | {"num_local_experts": 4}, _QKVO, ()),
    "qwen3_moe": (
        "qwen3_moe",
        _LLAMA_LIKE | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
        _QKVO,
        (),
    ),
    "falcon": (
        "falcon",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "vocab_size": VOCAB,
        },
        ("query_key_value", "self_attention.dense"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "bloom": (
        "bloom",
        {"hidden_size": HIDDEN, "n_layer": NUM_LAYERS, "n_head": 4, "vocab_size": VOCAB},
        ("query_key_value", "self_attention.dense"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
}

# Served too, but only the tests of experts need them.
_MORE_MIXTURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "qwen2_moe": (
        "qwen2_moe",
        _LLAMA_LIKE | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64},
        _QKVO,
        _GATED,
    ),
    "gpt_oss": (
        "gpt_oss",
        _LLAMA_LIKE | _EXPERTS | {"intermediate_size": HIDDEN, "num_local_experts": 4},
        _QKVO,
        (),
    ),
}

ARCHITECTURES: tuple[str, ...] = tuple(_SHAPES)
REFUSED_ARCHITECTURES: tuple[str, ...] = ("falcon", "bloom")  # they never call a registered attention function
SERVED_ARCHITECTURES: tuple[str, ...] = tuple(arch for arch in ARCHITECTURES if arch not in REFUSED_ARCHITECTURES)


def attention_targets(arch: str) -> list[str]:
    """Suffixes of the attention linears of an architecture, as `target_modules` takes them."""
    return list(_SHAPES[arch][2])


def all_targets(arch: str) -> list[str]:
    """Suffixes of the attention and feed-forward linears (experts excluded)."""
    return [*_SHAPES[arch][2], *_SHAPES[arch][3]]


def make_model(arch: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of one of ARCHITECTURES (or another mixture), float32, eval mode.

    Args:
        overrides: values of the transformers configuration, e.g. `num_hidden_layers=2`.
    """
    model_type, values, _, _ = (_SHAPES | _MORE_MIXTURES)[arch]
    neutral = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**values, **neutral, **overrides})
    factory: Any = AutoModelForCausalLM
    model: PreTrainedModel = factory.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.train(False)
    return model


def make_lora(
    model: PreTrainedModel,
    directory: Path | str,
    *,
    rank: int = 4,
    alpha: int = 8,
    targets: list[str] | str = "all-linear",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a PEFT LoRA adapter with random A and B (and random everything else it trains).

    Each delta is about half as large as the output of the linear it belongs to, whatever the
    rank and the scaling. `model` is not changed. Returns the adapter's directory.
    """
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **config)
    adapted = wrap(model, lora)
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    drawn: set[int] = set()
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            drawn |= _draw_factors(module, generator)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad and id(parameter) not in drawn:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():  # about tied and resized embeddings
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(directory))
    return Path(directory)


def wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """HF PEFT's untrained adapter over a copy of the model."""
    with warnings.catch_warnings():  # PEFT's own, e.g. about the orientation of Conv1D
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model), config)


def load_oracle(model: PreTrainedModel, directory: Path | str) -> PeftModel:
    """HF PEFT's own reading of an adapter directory, over a copy of the model."""
    with warnings.catch_warnings():  # PEFT only warns where Veneer refuses
        warnings.simplefilter("ignore")
        oracle: PeftModel = PeftModel.from_pretrained(copy.deepcopy(model), str(directory))
    return oracle.eval()


def random_prompt(length: int, *, seed: int = 0) -> list[int]:
    """Token ids in [2, VOCAB): neither padding nor the beginning of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


def _randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size, std: float) -> torch.Tensor:
        return std * torch.randn(shape, generator=generator)

    head = model.get_output_embeddings()
    tokens = model.get_input_embeddings()
    is_tied = head.weight is tokens.weight
    vocabulary_gain = _TIED_GAIN if is_tied else _LOGIT_SPREAD
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if module is head or module is tokens:
                    parameter.copy_(draw(parameter.shape, vocabulary_gain / math.sqrt(HIDDEN)))
                else:
                    _fill(module, parameter, draw)
        if is_tied:  # the last norm makes up for the small head
            _last_norm(model).weight.add_(_LOGIT_SPREAD / _TIED_GAIN - 1.0)


def _fill(module: torch.nn.Module, parameter: torch.Tensor, draw: Callable[[torch.Size, float], torch.Tensor]) -> None:
    if parameter.dim() == 1:  # norms and biases keep their neutral value, moved a little
        parameter.add_(draw(parameter.shape, 0.1))
    elif isinstance(module, torch.nn.Embedding):
        parameter.copy_(draw(parameter.shape, 0.2))
    else:
        num_inputs = parameter.shape[0 if isinstance(module, Conv1D) else -1]
        parameter.copy_(draw(parameter.shape, 1.0 / math.sqrt(num_inputs)))


def _last_norm(model: PreTrainedModel) -> Any:
    norms = [
        module
        for path, module in model.named_modules()
        if "Norm" in type(module).__name__ and not any(part.isdecimal() for part in path.split("."))
    ]
    return norms[-1]


def _draw_factors(module: Any, generator: torch.Generator) -> set[int]:
    """Fill A and B of every adapter of one layer; returns the ids of the parameters filled."""
    drawn: set[int] = set()
    for name, scaling in module.scaling.items():
        if name in module.lora_A:
            down, up = module.lora_A[name].weight, module.lora_B[name].weight
        else:
            down, up = module.lora_embedding_A[name], module.lora_embedding_B[name]
        rank = max(1, up.shape[1])
        with torch.no_grad():
            down.copy_(torch.randn(down.shape, generator=generator) / math.sqrt(down.shape[1]))
            up.copy_(torch.randn(up.shape, generator=generator) * (0.5 / (scaling * math.sqrt(rank))))
        drawn |= {id(down), id(up)}
    return drawn
