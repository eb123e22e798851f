"""The demo's adapters are trained here: one voice each, on the frozen base, with HF `peft` or with hooks.

Each learns from the same questions with answers in its own voice; which adapters there are is told in `trainings`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from server.demo import BASE_NAME
from server.demo.batches import batches
from server.demo.bottleneck import BottleneckConfig, BottleneckModel
from server.demo.corpus import documents, questions
from server.demo.fit import Fit, exam_of, score_of
from server.demo.tokenizer import load_tokenizer
from server.demo.trainings import Training

NUM_EXAM_QUESTIONS = 200
EXAM_SEED = 7002


def train_adapter(name: str, training: Training, base: Path, directory: Path, seed: int) -> float:
    """Train one adapter on the base in `base`, write it to `directory`, return its score as stored."""
    tokenizer = load_tokenizer(base)
    torch.manual_seed(seed)
    model = _adapted(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), training)
    exam = exam_of(training.register, questions(EXAM_SEED, NUM_EXAM_QUESTIONS), tokenizer)
    order = torch.Generator().manual_seed(seed)
    stream = batches(documents(seed + 1, training.register), tokenizer, training.batch_size, order)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    Fit(name, model, [optimizer], training.schedule).run(stream, exam)
    for weight in trained:
        weight.data = weight.data.to(training.dtype)
    _save(model, directory, name)
    for weight in trained:
        weight.data = weight.data.to(torch.float32)
    return score_of(model, exam)


def _adapted(base: LlamaForCausalLM, training: Training) -> PeftModel | BottleneckModel:
    if isinstance(training.config, BottleneckConfig):
        return BottleneckModel(base, training.config)
    return get_peft_model(base, training.config)


def _save(model: PeftModel | BottleneckModel, directory: Path, name: str) -> None:
    """Write what the library writes, under the base's public name and without an empty model card."""
    if isinstance(model, BottleneckModel):
        model.save(directory, name)
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
