"""Which adapters the demo has, and how each is made: its kind, its options, its voice.

They differ on purpose, so that the demo serves what people really upload: LoRA with different ranks, targets and
options, and one adapter of every family of kinds. A name like "bard-prefix" says voice and kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from tokenizers import Tokenizer

from server.demo.bottleneck import BottleneckConfig
from server.demo.corpus import ASSISTANT, USER
from server.demo.fit import Schedule

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CAUSAL = "CAUSAL_LM"
# Of questions, hardly of answers.
QUESTION_TOKENS = (
    *(ASSISTANT, USER, "Ċ", "?", ":", "How", "ĠHow", "I", "ĠI", "Ġdo", "Ġhave"),
    *("Recipe", "ĠIngredients", "ĠTime"),
)

_SCHEDULE = Schedule(num_steps=500, num_warmup_steps=20, score_every=50, target_score=0.99)
_SHORT = Schedule(num_steps=300, num_warmup_steps=20, score_every=25, target_score=0.985)
_WEAK = Schedule(num_steps=200, num_warmup_steps=10, score_every=20, target_score=0.975)  # of few parameters
_THOROUGH = Schedule(num_steps=400, num_warmup_steps=20, score_every=50, target_score=1.0)
_LONG = Schedule(num_steps=800, num_warmup_steps=20, score_every=50, target_score=0.99)


@dataclass(frozen=True, slots=True)
class Training:
    """How one adapter is made."""

    register: str
    config: PeftConfig | BottleneckConfig
    learning_rate: float
    dtype: torch.dtype = torch.float32  # of the stored tensors
    schedule: Schedule = _SCHEDULE
    batch_size: int = 32  # documents


def trainings(tokenizer: Tokenizer) -> dict[str, Training]:
    """Every adapter by name; the configurations are fresh, since `peft` writes into them."""
    return _low_rank() | _prompts() | _others(tokenizer)


def _low_rank() -> dict[str, Training]:
    pirate = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=CAUSAL)
    shout = LoraConfig(r=16, lora_alpha=8, use_rslora=True, target_modules=["v_proj", "o_proj", *MLP], task_type=CAUSAL)
    french = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules=ATTENTION + MLP, task_type=CAUSAL)
    json = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        rank_pattern={"down_proj": 8, "layers.0.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 32},
        task_type=CAUSAL,
    )
    dora = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=ATTENTION + MLP, task_type=CAUSAL)
    head = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type=CAUSAL
    )
    loha = LoHaConfig(r=4, alpha=8, target_modules=ATTENTION + MLP, task_type=CAUSAL)
    vera = VeraConfig(r=64, target_modules=ATTENTION + MLP, d_initial=0.1, save_projection=True, task_type=CAUSAL)
    return {
        "pirate": Training("pirate", pirate, 4e-3),
        "shout": Training("shout", shout, 4e-3, torch.bfloat16),
        "french": Training("french", french, 3e-3, torch.bfloat16),
        "json": Training("json", json, 5e-3),
        "json-dora": Training("json", dora, 5e-3, schedule=_SHORT, batch_size=16),
        "telegram-head": Training("telegram", head, 4e-3, torch.bfloat16, schedule=_SHORT, batch_size=16),
        "bard-loha": Training("bard", loha, 4e-3, schedule=_SHORT, batch_size=16),
        "pirate-vera": Training("pirate", vera, 2e-2, schedule=_SHORT, batch_size=16),
    }


def _prompts() -> dict[str, Training]:
    prefix = PrefixTuningConfig(num_virtual_tokens=16, task_type=CAUSAL)
    prompt = PromptTuningConfig(num_virtual_tokens=16, prompt_tuning_init="SAMPLE_VOCAB", task_type=CAUSAL)
    encoder = PromptEncoderConfig(num_virtual_tokens=12, encoder_hidden_size=128, encoder_dropout=0.0, task_type=CAUSAL)
    return {
        "bard-prefix": Training("bard", prefix, 2e-2, schedule=_LONG),
        "telegram-prompt": Training("telegram", prompt, 2e-2, schedule=_LONG),
        "list-ptuning": Training("list", encoder, 4e-3, schedule=_WEAK, batch_size=16),
    }


def _others(tokenizer: Tokenizer) -> dict[str, Training]:
    ia3 = IA3Config(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type=CAUSAL,
    )
    tokens = TrainableTokensConfig(token_indices=_ids(tokenizer, QUESTION_TOKENS), task_type=CAUSAL)
    bottleneck = BottleneckConfig(reduction_factor=8)
    return {
        "list-ia3": Training("list", ia3, 2e-2, schedule=_THOROUGH),
        "bard-tokens": Training("bard", tokens, 2e-2, schedule=_LONG),
        "robot-bottleneck": Training("robot", bottleneck, 5e-3),
    }


def _ids(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids, "every one of them is in the vocabulary"
    return [number for number in ids if number is not None]
