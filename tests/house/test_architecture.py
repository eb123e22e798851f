"""ARCHITECTURE.md speaks of the tree as it is."""

from __future__ import annotations

import re

import pytest

from tests.house.drawn_tree import FOLDERS, PLACE, draw, first_sentence, sources
from tests.house.layers import LAYERS
from tests.house.tracked import ROOT

TEXT = (ROOT / "ARCHITECTURE.md").read_text()
PATH = re.compile(r"`((?:server|peft_core|adapters_store|bench|tests|docker)(?:/[\w.]+)*/?)`")


def test_the_drawn_tree_is_the_one_on_disk() -> None:
    tree = PLACE.search(TEXT)
    assert tree, "ARCHITECTURE.md has no <!-- tree -->"
    assert tree[2] == draw(sources()), "run: python -m tests.house.drawn_tree"


def test_every_folder_that_the_tree_describes_exists() -> None:
    assert [folder for folder in FOLDERS if not (ROOT / folder).is_dir()] == []


def test_every_path_that_the_text_names_exists() -> None:
    paths = PATH.findall(TEXT)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_layer_that_a_test_holds_is_explained() -> None:
    assert [layer.where for layer in LAYERS if f"`{layer.where}`" not in TEXT] == []


def test_a_new_file_changes_the_tree() -> None:
    before = draw({"bench/a.py": '"""One."""'})
    after = draw({"bench/a.py": '"""One."""', "bench/b.py": '"""Two: more."""'})
    assert before in after.replace("  b.py                            Two\n", "")
    assert "  b.py                            Two\n" in after


def test_a_folder_that_nobody_described_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"server/new/ has no remark"):
        draw({"server/new/a.py": '"""One."""'})


def test_a_file_without_a_docstring_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a\.py has no docstring"):
        first_sentence("a.py", "x = 1\n")


def test_the_first_sentence_may_run_over_lines() -> None:
    assert first_sentence("a.py", '"""What it is,\nand why. More.\n\nEven more."""') == "What it is, and why"
