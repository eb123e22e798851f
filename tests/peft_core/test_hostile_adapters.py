"""Whatever an uploaded adapter holds, it is served or refused by an AdapterError: nothing else ever comes out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from peft_core.errors import AdapterError
from peft_core.methods import DecodeReport, check
from tests.peft_core.adapter_files import Entry, shared_spec

Q = "base_model.model.model.layers.0.self_attn.q_proj"
HEALTHY_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
HEALTHY_HEADER = {f"{Q}.lora_A.weight": Entry("F32", (4, 64)), f"{Q}.lora_B.weight": Entry("F32", (64, 4))}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["(", "*", "q_proj", ".*"]),
)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
field_names = st.sampled_from(
    [*(field.name for field in dataclasses.fields(LoraConfig)), "enable_lora", "new", "config"]
)
endings = st.sampled_from(["lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.bias", "weight", ""])
tensor_names = st.builds(
    "{}.{}".format, st.sampled_from([Q, "base_model.model.lm_head", "base_model.model.", "x"]), endings
)
entries = st.builds(
    Entry, st.sampled_from(["F32", "BF16", "I64", "F8_E4M3"]), st.lists(st.integers(0, 300), max_size=3).map(tuple)
)


def outcome(config: dict[str, Any], header: dict[str, Entry]) -> DecodeReport | AdapterError:
    try:
        return check(config, header, shared_spec("llama"))
    except AdapterError as error:
        return error


def test_the_healthy_adapter_is_served() -> None:
    assert isinstance(outcome(HEALTHY_CONFIG, HEALTHY_HEADER), DecodeReport)


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(field_names, json_values, max_size=3))
def test_any_config_is_served_or_refused(fields: dict[str, Any]) -> None:
    result = outcome(HEALTHY_CONFIG | fields, HEALTHY_HEADER)
    if isinstance(result, AdapterError):
        assert result.field is not None or result.tensor is not None
        assert str(result).endswith(".")


@settings(max_examples=200, deadline=None)
@given(planted=st.dictionaries(tensor_names, entries, max_size=3), keeps=st.booleans())
def test_any_header_is_served_or_refused(planted: dict[str, Entry], keeps: bool) -> None:
    result = outcome(HEALTHY_CONFIG, (HEALTHY_HEADER if keeps else {}) | planted)
    if isinstance(result, AdapterError) and planted:
        assert result.field is not None or result.tensor is not None


@pytest.mark.parametrize("pattern", ["(" * 5000, "a{99999999999}", "[a", "(?P<layer>x)", "\\", "(?<=a+)b"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "alpha_pattern"])
def test_an_expression_that_python_cannot_compile_is_refused(field: str, pattern: str) -> None:
    value: object = {pattern: 1} if field == "alpha_pattern" else pattern
    layers = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    assert isinstance(outcome(HEALTHY_CONFIG | layers | {field: value}, HEALTHY_HEADER), AdapterError | DecodeReport)


def test_a_deeply_nested_value_is_refused_by_name() -> None:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    result = outcome(HEALTHY_CONFIG | {"use_dora": value}, HEALTHY_HEADER)
    assert isinstance(result, AdapterError)
    assert result.field == "use_dora"
