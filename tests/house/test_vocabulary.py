"""One word for one thing: an adapter is an adapter, a block is a block, and a class is called after what it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.house.tracked import ROOT, tracked_files

EMPTY_NAMES = re.compile(r"(?:Helper|Util|Utils|Handler|Processor|Info|Impl)$")
KIND_NAMES = re.compile(r"lora", re.IGNORECASE)  # the engine knows forms; kinds have names in the decoders only
PAGE_NAMES = re.compile(r"(?:^|_)pages?(?:_|$)|Page(?!d)")
BLIND_TO_KINDS = ("peft_core/", "server/engine/")
DECODERS = "peft_core/methods/"


def definitions(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every class and function in a source text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name


def misnamed(path: str, source: str) -> list[str]:
    """Definitions whose names break the vocabulary, one sentence each."""
    found = []
    for line, name in definitions(source):
        if EMPTY_NAMES.search(name):
            found.append(f"{path}:{line} {name}: the last word says nothing; name the thing itself")
        if PAGE_NAMES.search(name) and path.startswith(BLIND_TO_KINDS):
            found.append(f"{path}:{line} {name}: the unit of memory is called a block")
        if KIND_NAMES.search(name) and path.startswith(BLIND_TO_KINDS) and not path.startswith(DECODERS):
            found.append(f"{path}:{line} {name}: only decoders know the kinds of adapters")
    return found


@pytest.mark.parametrize("path", [path for path in tracked_files("*.py") if not path.startswith("tests/")])
def test_names_keep_to_the_vocabulary(path: str) -> None:
    assert misnamed(path, (ROOT / path).read_text()) == []


def test_names_that_break_the_vocabulary_are_found() -> None:
    assert len(misnamed("server/api/x.py", "class RequestHelper: pass\n")) == 1
    assert len(misnamed("server/engine/x.py", "def load_lora(): pass\n")) == 1
    assert len(misnamed("peft_core/x.py", "class PageTable: pass\n")) == 1
    assert misnamed("peft_core/methods/lora/lora.py", "class LoraDecoder: pass\n") == []
    assert misnamed("server/engine/paged_attention.py", "def paged_attention(): pass\nclass PagedKeys: pass\n") == []
