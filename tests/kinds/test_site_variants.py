"""Every way to train a kind that rotates, scales, shifts or replaces modules: all in one batch, each as PEFT alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.peft_core.adapter_files import shared_model
from tests.peft_core.site_samples import SAMPLES
from tests.peft_core.tuner_samples import make_sample
from tests.tiny_engine import Answer, Ask, TinyEngine, assert_equals_oracle
from tests.tiny_models import load_oracle, random_prompt

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

ARCH = "qwen2"  # linears with a bias and linears without
NAMES = [name for name, sample in SAMPLES.items() if ARCH in sample.architectures]
SAVED = ("ia3", "oft", "boft", "road_1", "lokr", "glora, vectors")  # once more, with every norm and the head replaced


@cache
def answered(directory: Path) -> tuple[dict[str, Path], dict[str, Ask], dict[str, Answer]]:
    model = shared_model(ARCH)
    engine = TinyEngine(model, directory, chunk_size=16)
    adapters = {name: make_sample(SAMPLES[name], ARCH, directory / name) for name in NAMES}
    for name in SAVED:
        label = f"{name}, saved modules"
        adapters[label] = make_sample(SAMPLES[name], ARCH, directory / label, modules_to_save=["norm", "lm_head"])
    asks = {
        name: Ask(name, random_prompt(7 + index % 30, seed=index), engine.add(name, path), 4)
        for index, (name, path) in enumerate(adapters.items())
    }
    return adapters, asks, engine.run(asks.values(), stagger_steps=1)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}, saved modules" for name in SAVED)])
def test_a_variant_in_a_mixed_batch_equals_peft(name: str, workshop: Path) -> None:
    adapters, asks, answers = answered(workshop)
    assert_equals_oracle(asks[name], answers[name], load_oracle(shared_model(ARCH), adapters[name]))
