"""A tiny model on disk with the letters tokenizer, and two adapters: what the servers of these tests serve."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tests.front.letters import save_letters
from tests.tiny_models import attention_targets, make_lora, make_model

VOCAB = 300  # of the letters tokenizer


class ServedModel(NamedTuple):
    base: Path
    adapters: Path  # "poet" and "sql" are registered at start
    guest: Path  # an adapter to upload


def make_served_model(root: Path) -> ServedModel:
    base, adapters, guest = root / "base", root / "adapters", root / "guest"
    for directory in (base, adapters):
        directory.mkdir(parents=True)
    model = make_model("llama", seed=1, vocab_size=VOCAB)
    model.save_pretrained(base)
    save_letters(base)
    targets = attention_targets("llama")
    for seed, name in enumerate(("poet", "sql")):
        make_lora(model, adapters / name, rank=4, alpha=32, targets=targets, seed=seed)
    make_lora(model, guest, rank=8, alpha=32, targets=targets, seed=9)
    return ServedModel(base, adapters, guest)
