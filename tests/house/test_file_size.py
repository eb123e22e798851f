"""Files and functions stay small enough to be read in one go."""

from __future__ import annotations

import ast

import pytest

from tests.house.tracked import ROOT, tracked_files

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_DEPTH = 4
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def oversize(name: str, source: str) -> list[str]:
    """What is too long or too deep in one source text, one sentence each. A signature is not counted: it is a list."""
    found = []
    num_lines = source.count("\n")
    if num_lines > MAX_FILE_LINES:
        found.append(f"{name} has {num_lines} lines, more than {MAX_FILE_LINES}: it holds two concepts")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Function):
            continue
        length = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
        if length > MAX_FUNCTION_LINES:
            found.append(f"{name}:{node.lineno} {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
        if depth(node) > MAX_DEPTH:
            found.append(f"{name}:{node.lineno} {node.name} nests {depth(node)} deep, more than {MAX_DEPTH}")
    return found


def depth(node: ast.AST) -> int:
    """Nested control blocks below a node; `elif` does not nest, a function inside counts by itself."""
    return max((_depth_of(child, node) for child in ast.iter_child_nodes(node)), default=0)


def _depth_of(child: ast.AST, parent: ast.AST) -> int:
    if isinstance(child, Function):
        return 0
    is_elif = isinstance(child, ast.If) and isinstance(parent, ast.If) and parent.orelse == [child]
    return depth(child) + (isinstance(child, BLOCKS) and not is_elif)


@pytest.mark.parametrize("path", tracked_files("*.py"))
def test_a_file_is_one_concept_in_short_flat_functions(path: str) -> None:
    assert oversize(path, (ROOT / path).read_text()) == []


def test_a_file_that_is_too_long_is_found() -> None:
    assert oversize("long.py", "x = 1\n" * MAX_FILE_LINES) == []
    assert len(oversize("long.py", "x = 1\n" * (MAX_FILE_LINES + 1))) == 1


def test_a_function_that_is_too_long_is_found() -> None:
    body = "    x = 1\n"
    assert oversize("f.py", "def f():\n" + body * MAX_FUNCTION_LINES) == []
    assert len(oversize("f.py", "def f():\n" + body * (MAX_FUNCTION_LINES + 1))) == 1


def test_a_function_that_is_too_deep_is_found() -> None:
    def nested(levels: int) -> str:
        heads = "".join("    " * (level + 1) + "if x:\n" for level in range(levels))
        return "def f(x):\n" + heads + "    " * (levels + 1) + "pass\n"

    assert oversize("f.py", nested(MAX_DEPTH)) == []
    assert len(oversize("f.py", nested(MAX_DEPTH + 1))) == 1


def test_a_chain_of_elif_is_flat() -> None:
    assert depth(ast.parse("if a:\n    pass\nelif b:\n    pass\nelif c:\n    pass\n")) == 1
