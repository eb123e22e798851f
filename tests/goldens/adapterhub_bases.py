"""Tiny random bases for the goldens of AdapterHub, made with transformers 4.

Three layers, hidden 32, heads of 8 dimensions (4 query heads, 2 key/value heads where there is GQA), vocabulary 256,
float32. Every weight is random, norms and biases too, and logits spread over about 3: differences that matter are
then far above rounding. Mistral's window is shorter than the goldens' sequences.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

HIDDEN = 32
NUM_LAYERS = 3
VOCAB = 256
WINDOW = 16  # tokens
_LOGIT_SPREAD = 3.0

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
}
_GPT2: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB}
_GEMMA: dict[str, Any] = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

_GPTJ = _GPT2 | {"rotary_dim": 4, "tie_word_embeddings": False}
_PHI = {key: value for key, value in _LLAMA_LIKE.items() if key != "head_dim"} | {"partial_rotary_factor": 0.5}

# name of the base -> (model_type, values of its configuration)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "mistral": ("mistral", _LLAMA_LIKE | {"sliding_window": WINDOW}),
    "gpt2": ("gpt2", _GPT2),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", _LLAMA_LIKE),
    "gemma2": ("gemma2", _LLAMA_LIKE | _GEMMA),
    "gemma3": ("gemma3_text", _LLAMA_LIKE | _GEMMA),
    "phi": ("phi", _PHI),
    "gptj": ("gptj", _GPTJ),
}


def make_base(name: str, seed: int) -> Any:
    """A random model of one of SHAPES, with eager attention: the only kind under which AdapterHub's prefixes work."""
    model_type, values = SHAPES[name]
    neutral = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**values, **neutral})
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, torch_dtype=torch.float32, attn_implementation="eager")
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _randomise(model: Any, generator: torch.Generator) -> None:
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head.weight is tokens.weight
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:  # norms and biases keep their neutral value, moved a little
            parameter.add_(0.15 * noise)
        elif parameter is tokens.weight or parameter is head.weight:
            parameter.copy_(noise * (0.25 if is_tied else _LOGIT_SPREAD) / math.sqrt(HIDDEN))
        elif "wpe" in name:
            parameter.copy_(0.2 * noise)
        else:
            is_conv1d = model.config.model_type == "gpt2"
            parameter.copy_(noise / math.sqrt(parameter.shape[0 if is_conv1d else 1]))
    if is_tied:  # the last norm makes up for the small head
        last = [module for path, module in model.named_modules() if path.endswith((".norm", ".ln_f"))][-1]
        last.weight.add_(_LOGIT_SPREAD / 0.25 - 1.0)
