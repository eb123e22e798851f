from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.errors import InvalidName
from adapters_store.names import Reference, check_alias, check_name, parse_reference


@pytest.mark.parametrize("name", ["sql", "org/sql", "a", "A.b_c-1", "x" * 100, f"{'a' * 100}/{'b' * 100}", "1.json"])
def test_ordinary_names_are_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../etc", "a/../b", "a..b", "/a", "a/", "a//b", "a/b/c", ".a", "-a", "a b", "a,b", "a:b", "a@b",
     "a\n", "a\0", "a%2Fb", "sql\\x", "x" * 101, "versions", "org/aliases", "load", "é", "ａ", "a\u202eb"],
)  # fmt: skip
def test_names_that_climb_or_confuse_are_refused(name: str) -> None:
    with pytest.raises(InvalidName):
        check_name(name)


@pytest.mark.parametrize("alias", ["prod", "canary-2", "a", "v", "v1x", "default"])
def test_ordinary_aliases_are_taken(alias: str) -> None:
    assert check_alias(alias) == alias


@pytest.mark.parametrize("alias", ["", "Prod", "latest", "v3", "3", "a" * 64, "-a", "a/b", "a\n", "../x"])
def test_aliases_that_read_like_something_else_are_refused(alias: str) -> None:
    with pytest.raises(InvalidName):
        check_alias(alias)


def test_a_reference_is_a_name_an_alias_or_a_version() -> None:
    assert parse_reference("sql") == Reference("sql", None, "default")
    assert parse_reference("org/sql@prod") == Reference("org/sql", None, "prod")
    assert parse_reference("sql@3") == Reference("sql", 3, None)


@pytest.mark.parametrize(
    "text", ["sql@", "sql@0", "sql@03", "sql@-1", "sql@1e3", "sql@a@b", "@1", "sql@latest", "sql@٣"]
)
def test_other_references_are_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        parse_reference(text)


@given(st.text(max_size=40))
def test_a_reference_that_is_taken_reads_back_the_same(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidName:
        return
    assert parse_reference(str(reference)) == reference
    assert ".." not in reference.name
    assert not reference.name.startswith("/")
