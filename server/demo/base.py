"""The demo's base: a small Llama trained from nothing on the corpus.

Hidden matrices are trained by Muon (orthogonalised momentum, Jordan 2024), everything
else by AdamW. Trained in float32, stored in bfloat16 and scored as stored.

Training goes in cycles. Each starts from what the one before has stored, so an interrupted
training goes on with the first cycle that is missing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.demo.batches import batches
from server.demo.corpus import documents, questions
from server.demo.fit import Fit, Schedule, exam_of, score_of
from server.demo.registers import PLAIN
from server.demo.tokenizer import MAX_LENGTH, build_tokenizer, load_tokenizer

BATCH_SIZE = 32
CYCLES = (
    Schedule(num_steps=1600, num_warmup_steps=80, score_every=100, target_score=0.995),
    Schedule(num_steps=800, num_warmup_steps=20, score_every=100, target_score=0.995, peak=0.5),
)
NUM_EXAM_QUESTIONS = 200
EXAM_SEED = 7001


def base_config(vocab_size: int) -> LlamaConfig:
    """About 1.1 million parameters: small enough to ship, deep enough to copy."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_base(directory: Path, seed: int) -> float:
    """Train tokenizer and base, write both to the directory, return the score as stored.

    Every cycle's result is kept next to the directory, as `NAME-cycle-N`; the last one is copied into it.
    """
    done = [directory.with_name(f"{directory.name}-cycle-{number}") for number in range(1, len(CYCLES) + 1)]
    score = 0.0
    for number, (cycle, target) in enumerate(zip(CYCLES, done, strict=True)):
        if not (target / "model.safetensors").is_file():
            score = _train_cycle(cycle, target, done[number - 1] if number else None, seed + number)
    shutil.copytree(done[-1], directory, dirs_exist_ok=True)
    return score


def _train_cycle(cycle: Schedule, target: Path, start: Path | None, seed: int) -> float:
    """One cycle from `start`, or from nothing; writes `target`, returns the score as stored."""
    torch.manual_seed(seed)
    wrapped = build_tokenizer(seed) if start is None else PreTrainedTokenizerFast.from_pretrained(start)
    wrapped.save_pretrained(target)
    tokenizer = load_tokenizer(target)
    if start is None:
        model = LlamaForCausalLM(base_config(len(wrapped)))
    else:
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    exam = exam_of(PLAIN, questions(EXAM_SEED, NUM_EXAM_QUESTIONS), tokenizer)
    stream = batches(documents(seed), tokenizer, BATCH_SIZE, torch.Generator().manual_seed(seed))
    Fit("base", model, _optimizers(model), cycle).run(stream, exam)
    model.bfloat16()
    model.generation_config = GenerationConfig.from_dict({"eos_token_id": 0, "pad_token_id": 0})
    model.save_pretrained(target)
    return score_of(model, exam)


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    hidden = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for name, weight in model.named_parameters() if weight.ndim < 2 or "embed" in name]
    return [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
