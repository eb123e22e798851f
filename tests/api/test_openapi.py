"""The OpenAPI document: what it says, and that a fuzzer that reads it finds nothing it does not say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.api.app import create_app
from server.settings import Settings
from tests.api.conftest import Door, Visit
from tests.api.fake_server import FakeServer, upload

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with FakeServer(tmp_path_factory.mktemp("openapi") / "store") as running:
        yield running


SCHEMA: Any = schemathesis.openapi.from_dict(create_app(Settings()).openapi())
OPERATIONS: list[Any] = [found.ok() for found in SCHEMA.get_all_operations()]


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_request_of_a_fuzzer_gets_a_500_or_an_undocumented_answer(
    server: FakeServer, operation: Any, mode: GenerationMode
) -> None:
    upload(server.url, "pirate")

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def run(case: Any) -> None:
        case.validate_response(case.call(base_url=server.url), checks=CHECKS)

    with contextlib.suppress(Unsatisfiable):  # a route that takes nothing cannot be given anything wrong
        run()


def test_the_fuzzer_would_see_an_undocumented_answer(server: FakeServer) -> None:
    document = create_app(Settings()).openapi()
    del document["paths"]["/admin/v1/adapters/{name}"]["get"]["responses"]["404"]
    operation = schemathesis.openapi.from_dict(document)["/admin/v1/adapters/{name}"]["GET"]
    case = operation.Case(path_parameters={"name": "nobody"})
    with pytest.raises(FailureGroup) as found:
        case.validate_response(case.call(base_url=server.url), checks=CHECKS)
    assert "Undocumented status code" in str(found.value.exceptions[0])


def test_every_route_is_described(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for path, item in door.app.openapi()["paths"].items():
            for method, operation in item.items():
                assert operation["summary"], (method, path)
                assert operation["tags"], (method, path)

    visit(test)


def test_the_main_request_has_examples_that_work(visit: Visit) -> None:
    async def test(door: Door) -> None:
        examples = door.app.openapi()["components"]["schemas"]["GenerateRequest"]["examples"]
        await door.upload("pirate")
        assert len(examples) > 1
        for example in examples:
            assert (await door.client.post("/generate", json=example)).status_code == 200

    visit(test)
