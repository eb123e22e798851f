"""Every low-rank kind of PEFT besides LoRA computes what PEFT computes from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_core.methods import decode
from tests.peft_core.adapter_files import logits_of, read_adapter, shared_model, shared_spec
from tests.peft_core.low_rank_samples import CHANGES, SAMPLES
from tests.peft_core.tuner_samples import ModelWeights, decoded, make_sample
from tests.plain_forms import applied
from tests.tiny_models import load_oracle, random_prompt

PROMPT = random_prompt(24, seed=3)
CASES = [(name, arch) for name, sample in SAMPLES.items() for arch in sample.architectures]
DENSE = {"loha, wide", "gralora, hybrid", "miss, bat", "osf, half", "osf, patterns"}  # the whole matrix is smaller


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max())


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_the_logits_are_those_of_peft(name: str, arch: str, tmp_path: Path) -> None:
    directory = make_sample(SAMPLES[name], arch, tmp_path)
    model = shared_model(arch)
    expected = logits_of(load_oracle(model, directory), PROMPT)
    forms, report = decoded(directory, arch)
    with applied(model, forms, shared_spec(arch)):
        got = logits_of(model, PROMPT)
    assert distance(got, expected) < 5e-5, "and most are an order below"
    assert distance(expected, logits_of(model, PROMPT)) > 0.5, "an adapter that does little proves little"
    assert ("dense" in report.forms) == (name in DENSE)
    assert report.needs_base or name.split(",")[0] not in ("hra", "osf", "deft", "psoft", "peanut")


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_that_decides_is_read(name: str, tmp_path: Path) -> None:
    """Negative control: with another value of the field the logits are others."""
    directory = make_sample(SAMPLES[name], "llama", tmp_path)
    model, spec = shared_model("llama"), shared_spec("llama")
    expected = logits_of(load_oracle(model, directory), PROMPT)
    config, tensors = read_adapter(directory)
    for field, value in CHANGES[name].items():
        changed: dict[str, Any] = config | {field: value}
        with applied(model, decode(changed, tensors, spec, ModelWeights(model)).forms, spec):
            got = logits_of(model, PROMPT)
        assert distance(got, expected) > 1e-3, field


@pytest.mark.parametrize("name", ["hra", "osf", "deft", "psoft", "peanut", "miss, bat"])
def test_another_base_gives_another_adapter(name: str, tmp_path: Path) -> None:
    """Negative control: kinds that need the base's weights really read them."""
    directory = make_sample(SAMPLES[name], "llama", tmp_path)
    config, tensors = read_adapter(directory)
    right = decode(config, tensors, shared_spec("llama"), ModelWeights(shared_model("llama"))).forms
    wrong = decode(config, tensors, shared_spec("llama"), _Doubled(shared_model("llama"))).forms
    for path in (*right.linear, *right.changes):
        first = right.linear[path].up @ right.linear[path].down if path in right.linear else right.changes[path].dense
        second = wrong.linear[path].up @ wrong.linear[path].down if path in wrong.linear else wrong.changes[path].dense
        assert first is not None
        assert second is not None
        assert distance(first, second) > 1e-3


class _Doubled(ModelWeights):
    def weight(self, path: str) -> torch.Tensor:
        return super().weight(path).flip(0)
