"""Adapters whose virtual tokens stand before the prompt, as PEFT writes them; and what the plain model makes of them.

path = make_prompt_adapter("prefix", model, tmp_path / "brief", num_tokens=20, seed=1)
oracle_logits(load_oracle(model, path), "prefix", 20, prompt, tokens)      # PEFT, unpadded, alone
plain_logits(model, forms, prompt, tokens)                                 # no PEFT: past K/V, or embedded inputs
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import DynamicCache, PreTrainedModel

from peft_core.forms import AdapterForms
from tests.tiny_models import HEAD_DIM, wrap

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
TASK = 1  # of the adapters that have tasks
NUM_TASKS = 3


def _prefix(name: str) -> Callable[..., Any]:
    def config(model: PreTrainedModel, num_tokens: int, **values: Any) -> Any:
        heads = num_kv_heads(model)
        sizes = {"num_attention_heads": heads, "token_dim": heads * HEAD_DIM}
        return getattr(peft, name)(num_virtual_tokens=num_tokens, **CAUSAL, **sizes, **values)

    return config


def _rows(name: str, **given: Any) -> Callable[..., Any]:
    return lambda model, num_tokens, **values: getattr(peft, name)(
        num_virtual_tokens=num_tokens, **CAUSAL, **given, **values
    )


def _cpt(model: PreTrainedModel, num_tokens: int, **values: Any) -> Any:
    ids = [10 + i for i in range(num_tokens)]
    kinds = [1, 2, 3, 4] * num_tokens
    given: dict[str, Any] = {
        "cpt_token_ids": ids,
        "cpt_mask": [1] * num_tokens,
        "cpt_tokens_type_mask": kinds[:num_tokens],
    }
    return peft.CPTConfig(**given, **CAUSAL, **values)


KINDS: Mapping[str, Callable[..., Any]] = {
    "prefix": _prefix("PrefixTuningConfig"),
    "projected prefix": lambda model, num_tokens, **values: _prefix("PrefixTuningConfig")(
        model, num_tokens, prefix_projection=True, encoder_hidden_size=24, **values
    ),
    "cartridge": _prefix("CartridgeConfig"),
    "prompt": _rows("PromptTuningConfig"),
    "p-tuning": _rows("PromptEncoderConfig", encoder_hidden_size=32),
    "p-tuning lstm": _rows("PromptEncoderConfig", encoder_hidden_size=32, encoder_reparameterization_type="LSTM"),
    "multitask": _rows("MultitaskPromptTuningConfig", num_tasks=NUM_TASKS, num_ranks=2),
    "cpt": _cpt,
}
PREFIXES = ("prefix", "projected prefix", "cartridge")


def make_prompt_adapter(
    kind: str, model: PreTrainedModel, directory: Path, *, num_tokens: int = 5, seed: int = 0, **config: Any
) -> Path:
    """Write the adapter with random weights that matter; `model` is not changed."""
    with torch.random.fork_rng():  # some of what PEFT draws is no parameter of ours
        torch.manual_seed(seed)
        adapted = wrap(model, KINDS[kind](model, num_tokens, **config))
    generator = torch.Generator().manual_seed(31_337 + seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                scale = 0.3 if parameter.dim() == 1 else 1.0 if kind in PREFIXES else 0.5
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(directory))
    return directory


def num_kv_heads(model: PreTrainedModel) -> int:
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([[2, 3]]), use_cache=True).past_key_values
    return int(cache.layers[0].keys.shape[1])


def oracle_logits(
    oracle: Any, kind: str, num_tokens: int, prompt: list[int], tokens: list[int], *, task: int = TASK
) -> np.ndarray:
    """[generated tokens, vocabulary] float64: one unpadded forward over prompt and answer."""
    tasks = {"task_ids": torch.tensor([task])} if kind == "multitask" else {}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = oracle(input_ids=torch.tensor([prompt + tokens]), **tasks).logits[0]
    if kind not in PREFIXES:
        logits = logits[num_tokens:]
    rows: np.ndarray = logits[len(prompt) - 1 : -1].double().numpy()
    return rows


def oracle_tokens(oracle: Any, kind: str, num_tokens: int, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation, one forward a token: `generate` of PEFT 0.21 loses the virtual tokens under transformers
    5.24, which hands its cache over by another name.
    """
    tokens: list[int] = []
    while len(tokens) < count:
        logits = oracle_logits(oracle, kind, num_tokens, prompt, [*tokens, 0])
        tokens.append(int(logits[-1].argmax()))
    return tokens


def plain_logits(
    model: PreTrainedModel, forms: AdapterForms, prompt: list[int], tokens: list[int], *, task: int = 0
) -> np.ndarray:
    """The same by the plain model alone: a prefix as past K/V, virtual tokens as embedded inputs."""
    ids = torch.tensor([prompt + tokens])
    with torch.inference_mode(), warnings.catch_warnings():  # about the name that the cache is handed over by
        warnings.simplefilter("ignore")
        if forms.prefix is not None:
            logits = _after_prefix(model, forms.prefix, ids)
        else:
            assert forms.virtual is not None
            rows = forms.virtual.rows[task]
            embedded = torch.cat([rows[None], model.get_input_embeddings()(ids)], 1)
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, len(rows) :]
    result: np.ndarray = logits[len(prompt) - 1 : -1].double().numpy()
    return result


def _after_prefix(model: PreTrainedModel, prefix: Any, ids: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    for layer in range(len(prefix.keys)):
        keys, values = (part[layer].transpose(0, 1)[None] for part in (prefix.keys, prefix.values))
        cache.update(keys, values, layer)
    positions = torch.arange(ids.shape[1]) + prefix.first_position
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions[None], past_key_values=cache).logits[0]
    return logits
