"""The demo's training is in the tree and runs; what ships is what it makes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from server.demo import ADAPTER_NAMES, ADAPTERS_DIR, BASE_DIR, adapters, base
from server.demo.adapters import train_adapter, trainings
from server.demo.base import train_base
from server.demo.batches import Batch, encode_batch, weighted_loss
from server.demo.corpus import END, Document, questions
from server.demo.fit import Schedule, exam_of, score_of
from server.demo.registers import PLAIN
from server.demo.tokenizer import build_tokenizer, load_tokenizer

SEED = 0  # the one that the shipped data was made with
SHORT = Schedule(num_steps=2, num_warmup_steps=1, score_every=2, target_score=1.0)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Training on few documents, so that it takes seconds."""
    for module in (base, adapters):
        monkeypatch.setattr(module, "BATCH_SIZE", 4)
        monkeypatch.setattr(module, "NUM_EXAM_QUESTIONS", 8)
    return monkeypatch


def shipped_base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)


def exam(register: str) -> Batch:
    return exam_of(register, questions(31, 100), load_tokenizer(BASE_DIR))


def test_the_tokenizer_that_ships_is_the_one_that_training_makes() -> None:
    made = json.loads(build_tokenizer(SEED).backend_tokenizer.to_str())
    shipped = json.loads((BASE_DIR / "tokenizer.json").read_text())
    assert made["model"] == shipped["model"]
    assert made["added_tokens"] == shipped["added_tokens"]


def test_the_base_that_ships_answers_in_plain_english_word_for_word() -> None:
    model = shipped_base()
    assert score_of(model, exam(PLAIN)) >= 0.95
    assert score_of(model, exam("pirate")) == 0.0


@pytest.mark.parametrize("name", ADAPTER_NAMES)
def test_an_adapter_that_ships_brings_out_its_register(name: str) -> None:
    model = PeftModel.from_pretrained(shipped_base(), ADAPTERS_DIR / name)
    register = trainings()[name].register
    assert score_of(model, exam(register)) >= 0.95
    with model.disable_adapter():
        assert score_of(model, exam(register)) == 0.0


def test_one_wrong_token_makes_an_answer_wrong() -> None:
    good = exam(PLAIN)
    spoiled = good.token_ids.clone()
    spoiled[:, (good.weights == 1.0).int().argmax(dim=1)] += 1
    assert score_of(shipped_base(), Batch(spoiled, good.weights)) < 0.5


def test_questions_weigh_little_and_padding_nothing() -> None:
    documents = [Document(PLAIN, "How?\n", f"Mix.{END}"), Document(PLAIN, "", f"Mix 2 eggs with 3 eggs.{END}")]
    batch = encode_batch(documents, load_tokenizer(BASE_DIR))
    assert batch.weights[0].unique().tolist() == pytest.approx([0.0, 0.1, 1.0])
    logits = torch.zeros(*batch.token_ids.shape, 1300)
    assert weighted_loss(logits, batch).item() == pytest.approx(torch.tensor(1300.0).log().item())


def test_a_schedule_warms_up_and_ends_at_nothing() -> None:
    schedule = Schedule(num_steps=10, num_warmup_steps=2, score_every=1, target_score=1.0, peak=0.5)
    factors = [schedule.factor(step) for step in range(11)]
    assert factors[0] == 0.25
    assert factors[1:] == sorted(factors[1:], reverse=True)
    assert factors[10] == 0.0


def test_base_and_adapter_are_trained_again_from_the_tree(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    small.setattr(base, "CYCLES", (SHORT,))
    for run in ("one", "two"):
        train_base(tmp_path / run / "base", SEED)
    first, second = ((tmp_path / run / "base" / "model.safetensors").read_bytes() for run in ("one", "two"))
    assert first == second
    training = dataclasses.replace(trainings()["json"], schedule=SHORT)
    train_adapter("json", training, tmp_path / "one" / "base", tmp_path / "json", SEED)
    assert sorted(path.name for path in (tmp_path / "json").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "json" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "veneer-demo-base"


def test_training_goes_on_with_the_first_missing_cycle(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    small.setattr(base, "CYCLES", (SHORT,))
    train_base(tmp_path / "base", SEED)
    kept = (tmp_path / "base-cycle-1" / "model.safetensors").stat().st_mtime_ns
    small.setattr(base, "CYCLES", (SHORT, SHORT))
    train_base(tmp_path / "base", SEED)
    assert (tmp_path / "base-cycle-1" / "model.safetensors").stat().st_mtime_ns == kept
    assert (tmp_path / "base-cycle-2" / "model.safetensors").is_file()
