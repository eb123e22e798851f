"""What AdapterHub's library computed with its own adapters on its own tiny bases (`make goldens`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.engine.request import FinishReason
from tests.tiny_engine import TIE_MARGIN, Answer

DIRECTORY = Path(__file__).parents[1] / "goldens" / "adapterhub"
TOLERANCE = 1e-4  # of logits whose spread is about 3


class Golden(NamedTuple):
    """One adapter's expectation. `directory` is the adapter's."""

    name: str
    directory: Path
    prompt: list[int]
    tokens: list[int]  # greedy
    logits: np.ndarray  # [last rows of prompt + tokens, vocabulary] float64


def load_base(base: str) -> PreTrainedModel:
    factory: Any = AutoModelForCausalLM
    model: PreTrainedModel = factory.from_pretrained(DIRECTORY / base / "base").eval()
    return model


def load_goldens(base: str) -> dict[str, Golden]:
    """By name; "base" is the bare model."""
    found = json.loads((DIRECTORY / "goldens.json").read_text())["bases"][base]
    logits = load_file(str(DIRECTORY / base / "logits.safetensors"))
    return {
        name: Golden(name, DIRECTORY / base / name, one["prompt"], one["answer"], logits[name].double().numpy())
        for name, one in found.items()
    }


def assert_equals_golden(golden: Golden, answer: Answer) -> None:
    """Greedy tokens, and the distribution at each of them, as far as the first tie."""
    assert answer.finish is FinishReason.LENGTH, answer.error
    # The last row of the logits follows the last token of the answer; the one before it chose that token.
    expected = golden.logits[-len(golden.tokens) - 1 : -1]
    expected = expected - np.logaddexp.reduce(expected, axis=-1, keepdims=True)
    for index, (token, row) in enumerate(zip(golden.tokens, expected, strict=True)):
        assert np.abs(answer.logprobs[index] - row).max() <= TOLERANCE, f"{golden.name}: token {index}"
        if answer.tokens[index] != token:
            assert row.max() - row[answer.tokens[index]] <= TIE_MARGIN, f"{golden.name}: token {index}"
            return
