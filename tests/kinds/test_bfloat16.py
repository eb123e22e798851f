"""A base in bfloat16 with adapters in float32, as PEFT keeps them: as near to the truth as PEFT's own arithmetic.

The truth is the same weights, rounded to bfloat16, computed in float32. Two bfloat16 computations of one model differ
from each other by their rounding; what can be asked is that ours is not further from the truth than the library's.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.kinds.served import Served, prompt_for, serve_every_kind
from tests.kinds.zoo import KINDS, peft_logits
from tests.tiny_engine import Answer, Ask
from tests.tiny_models import load_oracle, make_model

FURTHER = 2.5  # times the library's own distance from the truth, for the worst kind
ON_AVERAGE = 1.25
PROMPT_LENGTH = 41


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bfloat16")


@cache
def answered(directory: Path) -> tuple[Served, dict[str, Ask], dict[str, Answer]]:
    model = make_model("llama", seed=1).to(torch.bfloat16)
    dtypes: dict[str, Any] = {"dtype": "bfloat16", "adapter_dtype": "float32"}
    served = serve_every_kind("llama", directory, model=model, chunk_size=16, **dtypes)
    asks = {kind: served.ask(kind, prompt_for(kind, PROMPT_LENGTH, seed=index), name=kind)
            for index, kind in enumerate(served.tickets)}  # fmt: skip
    return served, asks, served.engine.run(asks.values())


def distances(served: Served, kind: str, ask: Ask, answer: Answer) -> tuple[float, float]:
    """(ours, the library's) root mean square difference of log probabilities from the truth."""
    exact: PreTrainedModel = copy.deepcopy(served.model).float()
    truth, theirs = (
        log_softmax(peft_logits(kind, load_oracle(model, served.directory / kind), ask.prompt, answer.tokens))
        for model in (exact, served.model)
    )
    return rms(answer.logprobs - truth), rms(theirs - truth)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    rows: np.ndarray = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return rows


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_about_as_exact_as_its_library(kind: str, workshop: Path) -> None:
    served, asks, answers = answered(workshop)
    ours, theirs = distances(served, kind, asks[kind], answers[kind])
    assert ours <= FURTHER * theirs


def test_together_they_are_as_exact_as_the_library(workshop: Path) -> None:
    served, asks, answers = answered(workshop)
    pairs = np.array([distances(served, kind, asks[kind], answers[kind]) for kind in asks])
    assert pairs[:, 0].mean() <= ON_AVERAGE * pairs[:, 1].mean()


def test_the_measure_sees_a_scaling_that_is_a_little_off(workshop: Path) -> None:
    """Negative control."""
    served, asks, _ = answered(workshop)
    forms = served.engine.decode(served.directory / "lora")
    stronger = {path: replace(delta, up=1.2 * delta.up) for path, delta in forms.linear.items()}
    ticket = served.engine.add_forms("stronger", replace(forms, linear=stronger))
    ask = Ask("stronger", asks["lora"].prompt, ticket)
    ours, theirs = distances(served, "lora", ask, served.engine.run([ask])["stronger"])
    assert ours > FURTHER * theirs
