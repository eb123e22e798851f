"""Nothing is accepted and ignored in silence: what happens to fields that nobody knows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.unknown import edit_distance, header_value
from tests.api.conftest import Door, Visit


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"parameters": {"temprature": 1}}, "did you mean `temperature`"),
        ({"temprature": 1}, "did you mean `temperature`"),
        ({"adaptor": "x"}, "did you mean `adapter`"),
        ({"Adapter": "x"}, "did you mean `adapter`"),
        ({"lora_name": "x"}, "`adapter`"),
        ({"model": "x"}, "`adapter`"),
        ({"parameters": {"my_lora": "x"}}, "`adapter`"),
        ({"max_new_tokens": 5}, "belongs in `parameters`"),
        ({"parameters": {"inputs": "x"}}, "belongs at the top level"),
        ({"parameters": {"max_tokens": 5}}, "`parameters.max_new_tokens`"),
        ({"prompt": "x"}, "`inputs`"),
        ({"parameters": {"stop_sequences": ["x"]}}, "`parameters.stop`"),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused(visit: Visit, body: dict[str, Any], words: str) -> None:
    async def test(door: Door) -> None:
        answer = await door.generate(**body)
        assert answer.status_code == 422
        assert words in answer.json()["error"]

    visit(test)


def test_other_fields_are_told_and_counted(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for stream in (False, True):
            answer = await door.generate(customer="acme", stream=stream, parameters={"trace_id": 7, "x": 1})
            assert answer.status_code == 200
            assert answer.headers["x-veneer-ignored-fields"] == "customer, parameters.trace_id, parameters.x"
        assert "veneer_ignored_fields_total 6.0" in (await door.client.get("/metrics")).text
        assert "x-veneer-ignored-fields" not in (await door.generate()).headers

    visit(test)


def test_any_name_fits_into_a_header() -> None:
    names = [f"field {i}\r\nset-cookie: é\ud800" * 9 for i in range(50)]
    value = header_value(names)
    assert value.isascii()
    assert "\r" not in value
    assert "\n" not in value
    assert value.endswith("and 30 more")
    assert len(value) < 2000


@given(st.text(max_size=8), st.text(max_size=8))
def test_the_distance_is_a_distance(left: str, right: str) -> None:
    distance = edit_distance(left, right, 9)
    assert distance == edit_distance(right, left, 9)
    assert (distance == 0) == (left == right)
    assert abs(len(left) - len(right)) <= distance <= max(len(left), len(right))


def test_distances_that_are_known() -> None:
    assert edit_distance("temprature", "temperature", 2) == 1
    assert edit_distance("kitten", "sitting", 9) == 3
    assert edit_distance("kitten", "sitting", 2) == 3, "more than the limit is limit + 1"
