"""One real adapter of every kind that HF PEFT writes, with random weights that matter, and PEFT itself as the oracle.

adapter = make_adapter("dora", model, tmp_path / "dora", seed=3)
oracle = load_oracle(model, adapter)                     # from tests.tiny_models
logits = peft_logits(oracle, prompt, tokens)             # whatever the kind: virtual tokens are cut off
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tests.tiny_models import all_targets, attention_targets, wrap

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
NUM_VIRTUAL = 5
INVOCATION = [17, 4, 99]
WEAKER = {"randlora": 0.05}  # sums of so many matrices that rounding alone would be seen

ConfigOf = Callable[[PreTrainedModel, str], Any]  # (model, architecture) -> PeftConfig


def _lora(**values: Any) -> ConfigOf:
    def config(model: PreTrainedModel, arch: str) -> Any:
        given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": all_targets(arch), **CAUSAL, **values}
        resolved: dict[str, Any] = {name: value(model) if callable(value) else value for name, value in given.items()}
        return peft.LoraConfig(**resolved)

    return config


def _tuner(name: str, *, attention: bool = False, **values: Any) -> ConfigOf:
    def config(model: PreTrainedModel, arch: str) -> Any:
        targets = attention_targets(arch) if attention else all_targets(arch)
        return getattr(peft, name)(**{"target_modules": targets, **CAUSAL, **values})

    return config


def _prompt(name: str, **values: Any) -> ConfigOf:
    return lambda model, arch: getattr(peft, name)(num_virtual_tokens=NUM_VIRTUAL, **CAUSAL, **values)


def _prefix(name: str) -> ConfigOf:
    def config(model: PreTrainedModel, arch: str) -> Any:
        with torch.inference_mode():
            cache = model(input_ids=torch.tensor([[2, 3]]), use_cache=True).past_key_values
        _, heads, _, head_dim = cache.layers[0].keys.shape
        return getattr(peft, name)(
            num_virtual_tokens=NUM_VIRTUAL, num_attention_heads=heads, token_dim=heads * head_dim, **CAUSAL
        )

    return config


def _ia3(model: PreTrainedModel, arch: str) -> Any:
    attention, feed_forward = attention_targets(arch), all_targets(arch)[len(attention_targets(arch)) :]
    last = [name for name in feed_forward if name == feed_forward[-1]]
    return peft.IA3Config(target_modules=[*attention, *last], feedforward_modules=last, **CAUSAL)


def _cpt(model: PreTrainedModel, arch: str) -> Any:
    ids = list(range(10, 10 + NUM_VIRTUAL))
    return peft.CPTConfig(
        cpt_token_ids=ids, cpt_mask=[1] * NUM_VIRTUAL, cpt_tokens_type_mask=[1, 2, 2, 3, 4][:NUM_VIRTUAL], **CAUSAL
    )


def _with_first_linear(suffix: Callable[[PreTrainedModel], str]) -> ConfigOf:
    """LoRA on a table, and on something else beside it."""
    return lambda model, arch: _lora(target_modules=[suffix(model), all_targets(arch)[0]])(model, arch)


def _alora(model: PreTrainedModel, arch: str) -> Any:
    targets = attention_targets(arch) if arch == "opt" else all_targets(arch)  # PEFT fails on rows that OPT flattens
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "alora_invocation_tokens": INVOCATION}
    return peft.LoraConfig(target_modules=targets, **values, **CAUSAL)


def norm_suffixes(model: PreTrainedModel) -> list[str]:
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if "Norm" in type(module).__name__}
    return sorted(names)


def embedding_suffix(model: PreTrainedModel) -> str:
    table = model.get_input_embeddings()
    return _suffix_of(model, table)


def head_suffix(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return _suffix_of(model, head)


def _suffix_of(model: PreTrainedModel, wanted: Any) -> str:
    return next(str(path) for path, module in model.named_modules() if module is wanted).rpartition(".")[2]


KINDS: Mapping[str, ConfigOf] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "lora-bias": _lora(lora_bias=True),
    "lora-norms": _lora(modules_to_save=norm_suffixes),
    "lora-embedding": _with_first_linear(embedding_suffix),
    "lora-head": _with_first_linear(head_suffix),
    "lora-tables": _lora(modules_to_save=lambda model: [embedding_suffix(model), head_suffix(model)]),
    "lora-tokens": _lora(trainable_token_indices=[3, 5, 8, 13, 21]),
    "dora": _lora(use_dora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "olora": _lora(init_lora_weights="olora"),
    "alora": _alora,
    "adalora": _tuner("AdaLoraConfig", init_r=6, target_r=4, total_step=10),
    "ia3": _ia3,
    "loha": _tuner("LoHaConfig", r=2, alpha=4),
    "lokr": _tuner("LoKrConfig", r=4, alpha=8),
    "vera": _tuner("VeraConfig", attention=True, r=8),
    "pvera": _tuner("PveraConfig", attention=True, r=8),
    "vblora": _tuner("VBLoRAConfig", r=2, num_vectors=12, vector_length=8, topk=2),
    "unilora": _tuner("UniLoraConfig", r=2, theta_d_length=64),
    "hra": _tuner("HRAConfig", r=4),
    "miss": _tuner("MissConfig", r=8),
    "delora": _tuner("DeloraConfig", r=4, delora_lambda=4),
    "gralora": _tuner("GraloraConfig", r=4, alpha=8, gralora_k=2),
    "tinylora": _tuner("TinyLoraConfig", r=2, u=4),
    "osf": _tuner("OSFConfig", effective_rank=8),
    "deft": _tuner("DeftConfig", r=4),
    "psoft": _tuner("PsoftConfig", r=4),
    "peanut": _tuner("PeanutConfig", r=4),
    "oft": _tuner("OFTConfig", oft_block_size=8, r=0),
    "boft": _tuner("BOFTConfig", boft_block_size=8),
    "road": _tuner("RoadConfig", group_size=8),
    "randlora": _tuner("RandLoraConfig", attention=True, r=8),
    "hira": _tuner("HiraConfig", r=4),
    "c3a": _tuner("C3AConfig", block_size=8),
    "fourierft": _tuner("FourierFTConfig", n_frequency=50, scaling=30.0),
    "waveft": _tuner("WaveFTConfig", n_frequency=50, scaling=5.0),
    "shira": _tuner("ShiraConfig", r=4),
    "supertuning": _tuner("SupertuningConfig", sparsity=0.95),
    "glora": _tuner("GloraConfig", r=4),
    "frod": _tuner("FrodConfig"),
    "ln-tuning": lambda model, arch: peft.LNTuningConfig(target_modules=norm_suffixes(model), **CAUSAL),
    "beft": _tuner("BeftConfig"),
    "trainable-tokens": lambda model, arch: peft.TrainableTokensConfig(
        token_indices=[2, 4, 6, 8, 10], target_modules=[embedding_suffix(model)], **CAUSAL
    ),
    "prefix": _prefix("PrefixTuningConfig"),
    "cartridge": _prefix("CartridgeConfig"),
    "prompt": _prompt("PromptTuningConfig"),
    "p-tuning": _prompt("PromptEncoderConfig", encoder_hidden_size=32),
    "multitask": _prompt("MultitaskPromptTuningConfig", num_tasks=3, num_ranks=2),
    "cpt": _cpt,
}
# Kinds that PEFT itself cannot make on an architecture: those that know no transposed linears.
ABSENT: Mapping[str, frozenset[str]] = {
    "gpt2": frozenset(
        ("olora", "loha", "lokr", "hra", "miss", "delora", "psoft", "peanut", "oft", "boft", "road", "c3a", "shira")
    ).union(("supertuning", "glora", "beft", "osf"))
}
TASKS: Mapping[str, int] = {"multitask": 1}  # the kinds whose requests name a task
PROMPT_ROWS = ("prompt", "p-tuning", "multitask", "cpt")  # kinds whose forward returns logits of virtual tokens too


def make_adapter(kind: str, model: PreTrainedModel, arch: str, directory: Path, *, seed: int = 0) -> Path:
    """Write the adapter as PEFT does; `model` is not changed."""
    adapted = wrap(model, KINDS[kind](model, arch))
    generator = torch.Generator().manual_seed(7919 + seed)
    with torch.no_grad():
        for _name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                _move(parameter, generator, WEAKER.get(kind, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(directory))
    return directory


def _move(parameter: torch.Tensor, generator: torch.Generator, strength: float) -> None:
    """Away from the neutral start, in proportion to what the parameter is."""
    noise = strength * torch.randn(parameter.shape, generator=generator)
    if parameter.dim() == 1 or min(parameter.shape) == 1:
        parameter.add_((0.3 * noise).to(parameter.dtype))
    else:
        parameter.add_((0.35 * noise / parameter.shape[-1] ** 0.5).to(parameter.dtype))


def peft_logits(kind: str, oracle: PeftModel, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """[generated tokens, vocabulary] float64: one unpadded forward over prompt and answer."""
    ids = torch.tensor([prompt + tokens])
    task = {"task_ids": torch.tensor([TASKS[kind]])} if kind in TASKS else {}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = oracle(input_ids=ids, **task).logits[0]
    if kind in PROMPT_ROWS:
        logits = logits[NUM_VIRTUAL:]
    rows: np.ndarray = logits[len(prompt) - 1 : -1].double().numpy()
    return rows
