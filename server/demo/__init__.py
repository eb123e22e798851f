"""The built-in base, its adapters and how they were made.

    BASE_DIR                 the base: weights, tokenizer, chat template
    ADAPTERS_DIR / NAME      one directory an adapter, as HF `peft` saves it

Held here are only the names that the server needs; importing them loads no model and no torch. The data was generated
by `server.demo.corpus`, trained by `server.demo.train` and can be judged by `server.demo.evaluate`.
"""

from __future__ import annotations

from pathlib import Path

BASE_NAME = "veneer-demo-base"  # also what the adapters say they were trained on
BASE_DIR = Path(__file__).parent / "data" / "base"
ADAPTERS_DIR = Path(__file__).parent / "data" / "adapters"
ADAPTER_REGISTERS = {  # name -> the voice that it brings out
    "bard-loha": "bard",
    "bard-prefix": "bard",
    "bard-tokens": "bard",
    "french": "french",
    "json": "json",
    "json-dora": "json",
    "list-ia3": "list",
    "list-ptuning": "list",
    "pirate": "pirate",
    "pirate-vera": "pirate",
    "robot-bottleneck": "robot",
    "shout": "shout",
    "telegram-head": "telegram",
    "telegram-prompt": "telegram",
}
ADAPTER_NAMES = tuple(ADAPTER_REGISTERS)
EXAMPLE_PROMPT = (
    "How do I bake a lemon cake at 350 degrees with 200 grams of flour, 3 eggs and 2 spoons of sugar in 25 minutes?\n"
)

__all__ = ["ADAPTERS_DIR", "ADAPTER_NAMES", "ADAPTER_REGISTERS", "BASE_DIR", "BASE_NAME", "EXAMPLE_PROMPT"]
