"""ARCHITECTURE.md speaks of the tree as it is."""

from __future__ import annotations

import re

import pytest

from tests.house.drawn_tree import drawn_paths, undrawn
from tests.house.layers import LAYERS
from tests.house.tracked import ROOT, tracked_files

TEXT = (ROOT / "ARCHITECTURE.md").read_text()
PATH = re.compile(r"`((?:server|peft_core|adapters_store|bench|tests|docker)(?:/[\w.]+)*/?)`")


def test_every_path_of_the_drawn_tree_exists() -> None:
    missing = [path for path in drawn_paths(TEXT) if not _exists(path)]
    assert missing == []


def test_every_module_is_in_the_drawn_tree() -> None:
    modules = [path for path in tracked_files("*.py") if not path.endswith("__init__.py")]
    assert undrawn(modules, drawn_paths(TEXT)) == []


def test_every_path_that_the_text_names_exists() -> None:
    assert [path for path in PATH.findall(TEXT) if not (ROOT / path).exists()] == []


def test_every_layer_that_a_test_holds_is_explained() -> None:
    assert [layer.where for layer in LAYERS if f"`{layer.where}`" not in TEXT] == []


def test_a_tree_is_read_back_as_paths() -> None:
    tree = "<!-- tree -->\n```text\na/            one\n  b/          two\n    c.py      three\n  d.py\ne.py\n```\n"
    assert drawn_paths(tree) == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e.py"]


def test_a_tree_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="no <!-- tree -->"):
        drawn_paths("```text\na.py\n```\n")
    with pytest.raises(ValueError, match="cannot read"):
        drawn_paths("<!-- tree -->\n```text\na.py\n    b.py\n```\n")


def test_a_file_that_is_not_drawn_is_found() -> None:
    drawn = ["a/", "a/b.py", "closed/"]
    assert undrawn(["a/b.py", "a/c.py", "closed/d.py"], drawn) == ["a/c.py"]


def _exists(path: str) -> bool:
    return (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()
