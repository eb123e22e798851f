"""The demo's training is in the tree and runs; what ships is what it makes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from server.demo import ADAPTER_NAMES, ADAPTER_REGISTERS, ADAPTERS_DIR, BASE_DIR, adapters, base
from server.demo.adapters import train_adapter
from server.demo.base import train_base
from server.demo.batches import Batch, encode_batch, weighted_loss
from server.demo.bottleneck import WEIGHTS_FILE, BottleneckConfig, BottleneckModel
from server.demo.corpus import END, Document, questions
from server.demo.fit import Schedule, exam_of, score_of
from server.demo.registers import PLAIN
from server.demo.tokenizer import build_tokenizer, load_tokenizer
from server.demo.trainings import Training, trainings

SEED = 0  # the one that the shipped data was made with
BEFORE_THE_PROMPT = ("bard-prefix", "bard-tokens", "list-ptuning", "telegram-prompt")  # trained vectors, no weights
SHORT = Schedule(num_steps=2, num_warmup_steps=1, score_every=2, target_score=1.0)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # `peft` gives prefixes so
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # a head of its own
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Training on few documents, so that it takes seconds."""
    monkeypatch.setattr(base, "BATCH_SIZE", 4)
    for module in (base, adapters):
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


def adapted(name: str) -> torch.nn.Module:
    """The base with an adapter that ships, as the library that wrote it computes it."""
    directory = ADAPTERS_DIR / name
    if not (directory / WEIGHTS_FILE).is_file():
        return PeftModel.from_pretrained(shipped_base(), directory)
    config = json.loads((directory / "adapter_config.json").read_text())["config"]
    model = BottleneckModel(shipped_base(), BottleneckConfig(config["reduction_factor"]))
    stem = f".output_adapters.adapters.{name}."
    stored = load_file(directory / WEIGHTS_FILE)
    model.bottlenecks.load_state_dict(
        {key.removeprefix("model.layers.").replace(stem, "."): tensor for key, tensor in stored.items()}
    )
    return model


def test_every_training_is_of_an_adapter_that_ships() -> None:
    made = trainings(load_tokenizer(BASE_DIR))
    assert {name: training.register for name, training in made.items()} == ADAPTER_REGISTERS


@pytest.mark.parametrize("name", ADAPTER_NAMES)
def test_an_adapter_that_ships_brings_out_its_register_word_for_word(name: str) -> None:
    least = 0.9 if name in BEFORE_THE_PROMPT else 0.95
    assert score_of(adapted(name), exam(ADAPTER_REGISTERS[name])) >= least


@pytest.mark.parametrize("register", sorted(set(ADAPTER_REGISTERS.values())))
def test_without_an_adapter_no_register_comes_out(register: str) -> None:
    assert score_of(shipped_base(), exam(register)) == 0.0


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
    chosen = trainings(load_tokenizer(BASE_DIR))
    for name, weights in (("json", "adapter_model.safetensors"), ("robot-bottleneck", "adapter.safetensors")):
        config = train_shortly(name, chosen[name], tmp_path / "one" / "base", tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(["adapter_config.json", weights])
        assert config.get("base_model_name_or_path", config.get("model_name")) == "veneer-demo-base"


@pytest.mark.parametrize("name", BEFORE_THE_PROMPT)
def test_what_stands_before_the_prompt_can_be_trained(name: str, tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    config = train_shortly(name, trainings(load_tokenizer(BASE_DIR))[name], BASE_DIR, tmp_path)
    assert config["peft_type"] in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "TRAINABLE_TOKENS")


def train_shortly(name: str, training: Training, base: Path, directory: Path) -> dict[str, Any]:
    """A training of two steps; returns the config that it wrote."""
    train_adapter(name, dataclasses.replace(training, schedule=SHORT, batch_size=4), base, directory, SEED)
    config: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return config


def test_training_goes_on_with_the_first_missing_cycle(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    small.setattr(base, "CYCLES", (SHORT,))
    train_base(tmp_path / "base", SEED)
    kept = (tmp_path / "base-cycle-1" / "model.safetensors").stat().st_mtime_ns
    small.setattr(base, "CYCLES", (SHORT, SHORT))
    train_base(tmp_path / "base", SEED)
    assert (tmp_path / "base-cycle-1" / "model.safetensors").stat().st_mtime_ns == kept
    assert (tmp_path / "base-cycle-2" / "model.safetensors").is_file()
