"""Every field of a config is used, known to be irrelevant, or named in a refusal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from peft_core.errors import UnsupportedAdapter
from peft_core.methods import check
from peft_core.methods.lora.config import IRRELEVANT_FIELDS, REFUSED_FIELDS, REFUSED_PARTS, USED_FIELDS
from tests.peft_core.adapter_files import LoadedTensors, SavedAdapter, shared_spec

PREFIX = "base_model.model."


@pytest.fixture
def adapter(tmp_path: Path) -> SavedAdapter:
    saved = SavedAdapter(tmp_path, targets=["q_proj"])
    assert len(saved.check().sites) == 3  # so whatever a test sees refused below is refused for its change
    return saved


def unclassified(names: set[str]) -> set[str]:
    return names - {*USED_FIELDS, *IRRELEVANT_FIELDS, *REFUSED_FIELDS, *REFUSED_PARTS}


def test_every_field_that_peft_writes_is_classified_once() -> None:
    tables = [*USED_FIELDS, *IRRELEVANT_FIELDS, *REFUSED_FIELDS, *REFUSED_PARTS]
    assert len(tables) == len(set(tables))
    assert unclassified({field.name for field in dataclasses.fields(LoraConfig)}) == set()
    assert unclassified({"r", "use_rotations"}) == {"use_rotations"}


@pytest.mark.parametrize("field", USED_FIELDS)
def test_a_used_field_is_really_taken(field: str, adapter: SavedAdapter) -> None:
    """Negative control of the table: a nonsensical value changes the outcome or is refused."""
    if field == "base_model_name_or_path":
        assert adapter.check(base_model_name_or_path=3) == adapter.check()
        return
    error = adapter.refusal(**{field: {"nonsense": None}})
    assert field in (error.field, "peft_type")


ON = {
    "arrow_config": {"top_k": 2},
    "enable_lora": [True, False, True],
    "invocation_string": "<check>",
    "layer_replication": [[0, 2], [1, 3]],
}


@pytest.mark.parametrize("field", [*REFUSED_FIELDS, *REFUSED_PARTS])
def test_a_feature_that_is_not_served_is_refused_by_field_and_value(field: str, adapter: SavedAdapter) -> None:
    error = adapter.refusal(**{field: ON[field]})
    assert isinstance(error, UnsupportedAdapter)
    assert error.code == "unsupported_adapter"
    assert error.field == field
    assert f'field "{field}" = ' in str(error)
    assert str(error).endswith(".")
    for off in (None, False):
        assert len(adapter.check(**{field: off}).sites) == 3


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_an_empty_value_switches_a_feature_off(field: str, adapter: SavedAdapter) -> None:
    assert len(adapter.check(**{field: []}).sites) == 3


@pytest.mark.parametrize("field", REFUSED_PARTS)
def test_an_empty_object_switches_some_features_on(field: str, adapter: SavedAdapter) -> None:
    assert adapter.refusal(**{field: {}}).field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "some"),
        ("bias", "adalora_only"),
        ("task_type", "SEQ_CLS"),
        ("task_type", "SEQ_2_SEQ_LM"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "brand_new"),
        ("init_lora_weights", 3),
    ],
)
def test_a_value_that_changes_the_base_is_refused_by_name(field: str, value: object, adapter: SavedAdapter) -> None:
    error = adapter.refusal(**{field: value})
    assert isinstance(error, UnsupportedAdapter)
    assert error.field == field
    assert str(value) in str(error)


@pytest.mark.parametrize("start", ["eva", "mica", "gaussian", "orthogonal", True, None])
def test_a_start_that_leaves_the_base_alone_is_accepted(start: object, adapter: SavedAdapter) -> None:
    assert len(adapter.check(init_lora_weights=start).sites) == 3


@pytest.mark.parametrize("value", [1, 0, True, "x", [0], {"a": None}])
def test_an_unknown_field_is_refused_by_field_and_value(value: object, adapter: SavedAdapter) -> None:
    error = adapter.refusal(use_rotations=value)
    assert isinstance(error, UnsupportedAdapter)
    assert (error.field, '"use_rotations"' in str(error)) == ("use_rotations", True)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_switched_off_is_set_aside_and_told(value: object, adapter: SavedAdapter) -> None:
    report = adapter.check(use_rotations=value)
    assert "use_rotations" in report.irrelevant_fields


LEGACY = {  # as PEFT 0.2 wrote it
    "base_model_name_or_path": "huggyllama/llama-7b",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}
UNSLOTH = {  # fields that Unsloth adds or fills in its own way
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
    "lora_dropout": 0,
    "target_modules": r"(?:.*?(?:language|text).*?(?:q_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attn)\.(?:(?:q_proj)))",
}
BY_HAND = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj"], "bias": None}


@pytest.mark.parametrize("config", [LEGACY, UNSLOTH, BY_HAND], ids=["PEFT 0.2", "Unsloth", "by hand"])
def test_configs_that_other_tools_write_mean_the_same(config: dict[str, Any], adapter: SavedAdapter) -> None:
    expected = adapter.check().sites
    if "peft_type" in config:  # a whole config, not changes to the saved one
        adapter.config = {}
    assert adapter.check(**config).sites == expected


def test_an_irrelevant_field_is_told_with_its_reason(adapter: SavedAdapter) -> None:
    report = adapter.check(lora_dropout=0.5, megatron_config={"tp": 2})
    assert report.irrelevant_fields["lora_dropout"] == IRRELEVANT_FIELDS["lora_dropout"]
    assert report.sites == adapter.check().sites


def test_tying_the_head_means_nothing_where_embedding_and_head_are_two_weights(adapter: SavedAdapter) -> None:
    assert len(adapter.check(ensure_weight_tying=True).sites) == 3
    for side, shape in (("A", (4, 64)), ("B", (256, 4))):
        adapter.tensors[f"{PREFIX}lm_head.lora_{side}.weight"] = torch.ones(shape)
    targets = ["q_proj", "lm_head"]
    assert adapter.check(target_modules=targets, ensure_weight_tying=True) == adapter.check(target_modules=targets)


@pytest.mark.parametrize(
    ("said", "is_told"),
    [
        ("meta-llama/Llama-3-8B", True),
        ("acme/Tiny-Base", False),
        ("/home/me/models/tiny-base/", False),
        ("unsloth/tiny-base-unsloth-bnb-4bit", False),
        ("acme/tiny-base-GPTQ-Int4", False),
        (None, False),
        ("", False),
    ],
)
def test_another_name_of_the_base_is_a_warning_and_no_decision(
    said: str | None, is_told: bool, adapter: SavedAdapter
) -> None:
    spec = dataclasses.replace(shared_spec("llama"), name="acme/tiny-base")
    config = adapter.config | {"base_model_name_or_path": said}
    report = check(config, LoadedTensors(adapter.tensors).header, spec)
    assert any("acme/tiny-base" in warning for warning in report.warnings) == is_told
    assert len(report.sites) == 3


def test_the_report_is_plain_data(adapter: SavedAdapter) -> None:
    data = adapter.check().to_json()
    assert data["kind"] == "LORA"
    assert data["ranks"] == [4]
    assert data["sites"][0] == {"path": "model.layers.0.self_attn.q_proj", "rank": 4, "scaling": 2.0}
    assert data["num_parameters"] == sum(value.numel() for value in adapter.tensors.values())
