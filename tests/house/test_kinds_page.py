"""KINDS.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peft_core.methods import SERVED_KINDS
from peft_core.methods.kinds import ADAPTERHUB
from tests.house.kinds_table import (
    HEAD,
    PAGE,
    REFERENCE,
    UNMOVED,
    Base,
    Row,
    filled,
    gaps,
    hub_rows,
    listed,
    peft_rows,
    refusals_by_architecture,
    refused_rows,
    table,
    unwritten_kinds,
)
from tests.kinds.test_every_kind import ARCHITECTURES
from tests.kinds.zoo import KINDS

TEXT = PAGE.read_text()
QUICK = ("lora", "dora", "ia3", "oft", "lora-tables", "prompt")


def text_between(name: str) -> str:
    place = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", TEXT, re.DOTALL)
    assert place, f"KINDS.md has no <!-- {name} -->"
    return place[1].strip()


def lines_between(name: str) -> list[str]:
    """The rows of a table of the page."""
    return [line for line in text_between(name).splitlines() if line.startswith("|")][2:]


def line_of(row: Row) -> str:
    return table(HEAD, [(row.name, f"`{row.peft_type}`", *row[2:])]).splitlines()[-1]


def test_every_kind_of_the_zoo_has_its_line() -> None:
    names = [line.split("|")[1].strip() for line in lines_between("kinds")]
    assert names == [name for name in KINDS if name not in UNMOVED], "run: python -m tests.house.kinds_table"


def test_every_served_kind_is_named() -> None:
    assert [kind for kind in SERVED_KINDS if kind != ADAPTERHUB and f"`{kind}`" not in TEXT] == []


@pytest.mark.parametrize(
    "kinds", [QUICK, pytest.param(tuple(set(KINDS) - set(QUICK)), marks=pytest.mark.slow)], ids=["quick", "rest"]
)
def test_a_line_is_what_the_decoder_and_the_packer_say(kinds: tuple[str, ...], tmp_path: Path) -> None:
    base = Base.make("llama", tmp_path / "base", **REFERENCE)
    told = {line.split("|")[1].strip(): line for line in lines_between("kinds")}
    for row in peft_rows(base, tmp_path, kinds):
        assert told[row.name] == line_of(row), "run: python -m tests.house.kinds_table"


def test_the_kinds_that_nothing_here_writes_are_listed() -> None:
    written = {line.split("|")[2].strip(" `") for line in lines_between("kinds")}
    assert text_between("more") == listed([f"`{kind}`" for kind in unwritten_kinds(written)])


def test_the_architectures_are_those_that_are_tested() -> None:
    assert text_between("architectures") == listed(ARCHITECTURES)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.slow
def test_nothing_that_a_library_writes_is_refused_beyond_what_is_told(tmp_path: Path) -> None:
    assert text_between("gaps") == gaps(refusals_by_architecture(tmp_path))


def test_a_refused_kind_would_be_told() -> None:
    assert gaps({"oft": ["gpt2", "opt"]}).splitlines()[-1] == "| oft | gpt2, opt |"


def test_the_methods_of_adapterhub_are_those_of_the_decoder(tmp_path: Path) -> None:
    told = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines_between("adapterhub")]
    assert told == [(row.name, row.becomes, row.reads_base) for row in hub_rows(tmp_path)]


def test_the_refused_kinds_are_those_of_the_code() -> None:
    told = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines_between("refused")]
    assert told == [(f"`{kind}`", why) for kind, why in refused_rows()]


def test_a_page_without_a_mark_is_an_error() -> None:
    assert filled("<!-- a -->\nold\n<!-- /a -->", {"a": "new"}) == "<!-- a -->\n\nnew\n\n<!-- /a -->"
    with pytest.raises(AssertionError, match="must have one"):
        filled("nothing", {"a": "new"})
