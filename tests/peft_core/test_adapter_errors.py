"""Errors about adapters carry what a program needs, as plain data."""

from __future__ import annotations

import json

import pytest

from peft_core.errors import AdapterError, BaseMismatch, MalformedAdapter, UnsupportedAdapter


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UnsupportedAdapter, "unsupported_adapter"),
        (MalformedAdapter, "malformed_adapter"),
        (BaseMismatch, "base_mismatch"),
    ],
)
def test_each_error_has_a_stable_code(kind: type[AdapterError], code: str) -> None:
    assert kind("why").details() == {"code": code, "message": "why", "field": None, "value": None, "tensor": None}
    assert kind("why", code="other").code == "other"


def test_details_survive_json_and_name_field_and_value() -> None:
    details = UnsupportedAdapter("why", field="use_dora", value=True, tensor="t").details()
    assert json.loads(json.dumps(details)) == details
    assert (details["field"], details["value"], details["tensor"]) == ("use_dora", "true", "t")


def test_a_long_or_strange_value_is_shown_short() -> None:
    value = MalformedAdapter("why", field="target_modules", value=["q_proj"] * 1000).value
    assert value is not None
    assert len(value) == 120
    assert MalformedAdapter("why", field="x", value={1}).value == "a value of type set"
