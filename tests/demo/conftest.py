"""One running demo server for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.demo.household import Household
from server.demo.visitor import Visitor


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    """A visitor of a server with the built-in base and every built-in adapter."""
    with Household(tmp_path_factory.mktemp("house")) as house:
        yield Visitor(house.url)
