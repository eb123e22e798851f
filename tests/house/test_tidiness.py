"""What lies in the tree is finished, belongs to no particular machine, and has a name of its own."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.house.tracked import ROOT, tracked_files

CODE = ("*.py", "*.js", "*.css", "*.html", "Makefile", "Dockerfile", "run")
PROSE_AND_DATA = ("*.md", "*.toml", "*.txt", "*.yaml", "*.yml", "*.json")
# Written with a class of one character, so that this file does not find itself. "/home/me" is anybody's.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:hom[e]/(?!me\b)|User[s]/|roo[t]/|wor[k]/|tm[p]/)\w")
UNFINISHED = re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X]|NotImplementedErro[r])\b")
SECRETS = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,})\b")


def marks(pattern: re.Pattern[str], text: str) -> list[str]:
    """The lines that the pattern is found in, numbered."""
    return [
        f"line {number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)
    ]


@pytest.mark.parametrize("path", tracked_files(*CODE, *PROSE_AND_DATA))
def test_a_file_is_finished_and_names_no_machine(path: str) -> None:
    text = (ROOT / path).read_text()
    assert marks(MACHINE_PATHS, text) == []
    assert marks(UNFINISHED, text) == []
    assert marks(SECRETS, text) == []


def test_a_path_of_one_machine_is_found() -> None:
    for folder in ("home", "Users", "root", "work", "tmp"):
        assert marks(MACHINE_PATHS, f'path = "/{folder}/somebody"') == [f'line 1: path = "/{folder}/somebody"']
    assert marks(MACHINE_PATHS, "GET /v1/work/units and tests/tmp/x") == []


def test_marks_of_unfinished_work_are_found() -> None:
    assert marks(UNFINISHED, "x = 1  # " + "TO" + "DO later") != []
    assert marks(UNFINISHED, "raise NotImplemented" + "Error") != []
    assert marks(UNFINISHED, "a list of todos") == []


def test_a_secret_is_found() -> None:
    assert marks(SECRETS, "token = 'hf_" + "a" * 34 + "'") != []
    assert marks(SECRETS, "hf_transfer") == []


def test_modules_of_the_tests_have_names_of_their_own() -> None:
    paths = [Path(path) for path in tracked_files("*.py") if path.startswith("tests/")]
    names = Counter(path.name for path in paths if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
    assert [path for path in paths if path.name == "__init__.py"] == []


@pytest.mark.parametrize("path", tracked_files("__init__.py"))
def test_an_init_file_holds_names_and_no_logic(path: str) -> None:
    assert logic((ROOT / path).read_text()) == []


def test_logic_in_an_init_file_is_found() -> None:
    assert logic('"""Doc."""\nfrom a import b\n__version__ = "1"\n__all__ = ["b"]\n') == []
    assert logic("import os\nif os.name == 'nt':\n    x = 1\n") == ["If in line 2"]
    assert logic("def f():\n    pass\n") == ["FunctionDef in line 1"]


def logic(source: str) -> list[str]:
    """Statements that are more than a docstring, an import or the binding of a name."""
    plain = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    return [
        f"{type(node).__name__} in line {node.lineno}"
        for node in ast.parse(source).body
        if not isinstance(node, plain) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
