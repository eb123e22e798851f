"""The demo's adapters: one voice each, trained with HF `peft` on the frozen base.

They differ on purpose in rank, targets and options, so that the demo serves what people
really upload. Each is trained on the same questions with answers in its own voice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from server.demo import BASE_NAME
from server.demo.batches import batches
from server.demo.corpus import documents, questions
from server.demo.fit import Fit, Schedule, exam_of, score_of
from server.demo.tokenizer import load_tokenizer

BATCH_SIZE = 32
NUM_EXAM_QUESTIONS = 200
EXAM_SEED = 7002
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

_SCHEDULE = Schedule(num_steps=500, num_warmup_steps=20, score_every=50, target_score=0.99)


@dataclass(frozen=True, slots=True)
class Training:
    """How one adapter is made."""

    register: str
    config: PeftConfig
    learning_rate: float
    dtype: torch.dtype  # of the stored tensors
    schedule: Schedule = _SCHEDULE


def trainings() -> dict[str, Training]:
    """Every adapter by name; the configurations are fresh, since `peft` writes into them."""
    pirate = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    shout = LoraConfig(
        r=16,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["v_proj", "o_proj", *MLP],
        task_type="CAUSAL_LM",
    )
    french = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules=ATTENTION + MLP, task_type="CAUSAL_LM")
    json = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        rank_pattern={"down_proj": 8, "layers.0.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 32},
        task_type="CAUSAL_LM",
    )
    return {
        "pirate": Training("pirate", pirate, 4e-3, torch.float32),
        "shout": Training("shout", shout, 4e-3, torch.bfloat16),
        "french": Training("french", french, 3e-3, torch.bfloat16),
        "json": Training("json", json, 5e-3, torch.float32),
    }


def train_adapter(name: str, training: Training, base: Path, directory: Path, seed: int) -> float:
    """Train one adapter on the base in `base`, write it to `directory`, return its score as stored."""
    tokenizer = load_tokenizer(base)
    torch.manual_seed(seed)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), training.config)
    exam = exam_of(training.register, questions(EXAM_SEED, NUM_EXAM_QUESTIONS), tokenizer)
    stream = batches(documents(seed + 1, training.register), tokenizer, BATCH_SIZE, torch.Generator().manual_seed(seed))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    Fit(name, model, [optimizer], training.schedule).run(stream, exam)
    for weight in trained:
        weight.data = weight.data.to(training.dtype)
    _save(model, directory)
    for weight in trained:
        weight.data = weight.data.to(torch.float32)
    return score_of(model, exam)


def _save(model: PeftModel, directory: Path) -> None:
    """Write what `peft` writes, under the base's public name and without its empty model card."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
