"""alpha / rank in all its spellings: patterns in file order, defaults, nulls, and configs that contradict the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_core.errors import MalformedAdapter
from peft_core.methods import check, decode
from tests.peft_core.adapter_files import (
    LoadedTensors,
    applied,
    load_adapter,
    logits_of,
    read_adapter,
    relative_error,
    shared_model,
    shared_spec,
    write_adapter,
)
from tests.tiny_models import load_oracle, make_lora, random_prompt

Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")


def factors(path: str, rank: int, num_inputs: int = 64, num_outputs: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        f"base_model.model.{path}.lora_A.weight": torch.randn(rank, num_inputs, generator=generator),
        f"base_model.model.{path}.lora_B.weight": torch.randn(num_outputs, rank, generator=generator),
    }


def scalings(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    report = check({"peft_type": "LORA"} | config, LoadedTensors(tensors).header, shared_spec("llama"))
    return {site.path: site.scaling for site in report.sites}


def test_scaling_is_alpha_over_rank_or_over_its_root() -> None:
    config = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
    assert scalings(config, factors(Q, 4)) == {Q: 4.0}
    assert scalings(config | {"use_rslora": True}, factors(Q, 4)) == {Q: 8.0}


def test_scaling_is_folded_into_the_up_side_in_float32() -> None:
    tensors = factors(Q, 4)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    delta = decode(config, LoadedTensors(tensors), shared_spec("llama")).forms.linear[Q]
    down, up = tensors.values()
    assert torch.equal(delta.down, down)
    assert torch.equal(delta.up, up * 1.5)
    assert (delta.down.dtype, delta.up.dtype) == (torch.float32, torch.float32)


def test_absent_and_null_fields_take_the_defaults_of_peft() -> None:
    config = {"target_modules": ["q_proj"]}
    assert scalings(config, factors(Q, 8)) == {Q: 1.0}
    nulls = dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "loftq_config"))
    assert scalings(config | nulls, factors(Q, 8)) == {Q: 1.0}


def test_the_rank_is_read_from_the_file_where_the_config_does_not_say_it() -> None:
    assert scalings({"target_modules": ["q_proj"], "lora_alpha": 8}, factors(Q, 2)) == {Q: 4.0}


def test_alpha_may_be_a_fraction() -> None:
    assert scalings({"target_modules": ["q_proj"], "r": 4, "lora_alpha": 0.5}, factors(Q, 4)) == {Q: 0.125}


def test_each_module_has_its_own_rank_and_alpha() -> None:
    config = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"k_proj": 9},
        "alpha_pattern": {"k_proj": 6},
    }
    assert scalings(config, factors(Q, 4) | factors(K, 9, num_outputs=32)) == {Q: 4.0, K: 2.0}


def test_the_first_pattern_in_file_order_decides(tmp_path: Path) -> None:
    """PEFT sorts the keys when it saves, so the file's order is not that of training. The file counts."""
    model, prompt = shared_model("llama"), random_prompt(30)
    trained = {"q_proj": 40, r".*layers\.0\..*q_proj": 4}
    directory = make_lora(model, tmp_path / "saved", rank=4, alpha=4, targets=["q_proj"], alpha_pattern=trained)
    config, tensors = load_adapter(directory)
    assert list(config["alpha_pattern"]) == sorted(trained)
    by_layer = scalings(config, tensors)
    assert list(by_layer.values()) == [1.0, 10.0, 10.0]

    swapped = write_adapter(tmp_path / "swapped", config | {"alpha_pattern": trained}, tensors)
    assert list(scalings(json.loads((swapped / "adapter_config.json").read_text()), tensors).values()) == [10.0] * 3
    for path, other in ((directory, swapped), (swapped, directory)):
        expected = logits_of(load_oracle(model, path), prompt)
        with applied(model, decode(*read_adapter(path), shared_spec("llama")).forms):
            assert relative_error(logits_of(model, prompt), expected) < 1e-5
        with applied(model, decode(*read_adapter(other), shared_spec("llama")).forms):
            assert relative_error(logits_of(model, prompt), expected) > 0.01


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("^model.layers.0.self_attn.q_proj", True),
        (".*", True),
        ("_proj", False),
        ("q_pro", False),
        ("layers.1.*", False),
    ],
)
def test_a_pattern_fits_the_end_of_a_path_at_a_dot(pattern: str, fits: bool) -> None:
    config = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 12}}
    assert scalings(config, factors(Q, 4)) == {Q: 3.0 if fits else 1.0}


@pytest.mark.parametrize(
    "claim",
    [
        {"r": 8},
        {"r": 8 * 10**400},
        {"r": 4, "rank_pattern": {"q_proj": 8}},
        {"r": 4, "rank_pattern": {"q_proj": 8, ".*": 4}},
    ],
)
def test_a_rank_that_contradicts_the_file_is_refused(claim: dict[str, Any]) -> None:
    with pytest.raises(MalformedAdapter, match=r"has rank 4 .*config says 8") as refusal:
        scalings({"target_modules": ["q_proj"]} | claim, factors(Q, 4))
    assert refusal.value.tensor == f"base_model.model.{Q}.lora_A.weight"


def test_a_later_pattern_does_not_contradict() -> None:
    config = {"target_modules": ["q_proj"], "r": 16, "lora_alpha": 8, "rank_pattern": {"q_proj": 4, ".*": 8}}
    assert scalings(config, factors(Q, 4)) == {Q: 2.0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "16"),
        ("r", 0),
        ("r", -4),
        ("r", 4.0),
        ("r", True),
        ("lora_alpha", "32"),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_alpha", 10**400),
        ("alpha_pattern", {"q_proj": -(10**400)}),
        ("lora_alpha", True),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": math.inf}),
        ("alpha_pattern", ["q_proj"]),
        ("alpha_pattern", {"(": 1}),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"(?i)q_proj": 4}),
    ],
)
def test_a_scaling_field_of_the_wrong_type_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(MalformedAdapter) as refusal:
        scalings({"target_modules": ["q_proj"]} | {field: value}, factors(Q, 4))
    assert refusal.value.field == field


def test_a_pattern_that_decides_for_no_module_is_told() -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "alpha_pattern": {"q_porj": 64, "q_proj": 8}}
    (warning,) = check(config, LoadedTensors(factors(Q, 4) | others_of_q()).header, shared_spec("llama")).warnings
    assert "q_porj" in warning


def others_of_q() -> dict[str, torch.Tensor]:
    return {name: value for layer in (1, 2) for name, value in factors(Q.replace(".0.", f".{layer}."), 4).items()}
