"""Who may import whom, and the reader of imports that finds who did.

Only direct imports count, wherever they stand in a file (inside functions and under TYPE_CHECKING too), so that every
dependency can be read in full at the top of the file that has it.

Running example:
    Layer("adapters_store", ("torch",)) over `adapters_store/header.py` with `from torch import nn` in line 3
    -> "adapters_store/header.py:3 imports torch.nn: adapters_store must not import torch"
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

WEB = ("fastapi", "starlette", "uvicorn")
ENGINE_DOORS = ("server.engine.client", "server.engine.request", "server.engine.errors")
# ... and what they say of themselves, as plain data.
API_DOORS = (*ENGINE_DOORS, "server.engine.metrics", "server.engine.stats", "server.loader.errors")


@dataclass(frozen=True, slots=True)
class Layer:
    """One rule: what lies under `where` must not import `forbidden`, but may import `doors` of it."""

    where: str  # a folder or a file, relative to the root
    forbidden: tuple[str, ...]  # dotted names; a name covers everything below it
    doors: tuple[str, ...] = ()  # dotted names below a forbidden one that are allowed all the same
    but_for: tuple[str, ...] = ()  # files or folders below `where` that the rule leaves alone


class Import(NamedTuple):
    line: int
    name: str  # dotted, absolute; "" for a relative import


LAYERS = (
    Layer("peft_core", ("server", "adapters_store", "peft", "pydantic", "huggingface_hub", "asyncio", "http", *WEB)),
    Layer("adapters_store", ("server", "peft_core", "torch", "transformers", "peft", *WEB)),
    Layer("server", ("peft",), but_for=("server/demo",)),
    Layer(
        "server/engine",
        ("server.api", "server.front", "server.library", "server.loader", "server.settings", "pydantic", *WEB),
    ),
    # The Hub and buckets are met in one file each, and read by nobody who does not fetch from them.
    Layer("server", ("huggingface_hub",), but_for=("server/library/sources/hub.py", "server/engine/base_model.py")),
    Layer("server", ("fsspec",), but_for=("server/library/sources/bucket.py",)),
    Layer("server/library", ("server.api", "server.front", "server.engine", *WEB), doors=ENGINE_DOORS),
    Layer("server/loader", ("server.api", "server.front", "server.engine", *WEB)),
    Layer("server/front", ("server.api", "server.loader.worker", *WEB)),
    Layer("server/api", ("server.engine", "server.loader", "peft_core"), doors=API_DOORS),
)

# The front process and the planning half of the engine: no torch, directly or by whatever they import.
TORCH_FREE = (
    "adapters_store",
    "server/api",
    "server/front",
    "server/library",
    "server/channel.py",
    "server/setting_groups",
    "server/settings.py",
    "server/engine/adapter_manager.py",
    "server/engine/adapter_records.py",
    "server/engine/block_manager.py",
    "server/engine/client.py",
    "server/engine/config.py",
    "server/engine/device_adapters.py",
    "server/engine/errors.py",
    "server/engine/policy.py",
    "server/engine/request.py",
    "server/engine/scheduler.py",
    "server/engine/sequence.py",
    "server/engine/step.py",
    "server/engine/wire.py",
)


def imports_of(source: str) -> Iterator[Import]:
    """Every name that a source text imports, with its line; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield Import(node.lineno, "")
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def python_files(root: Path, where: str) -> list[Path]:
    """The Python files that `where` (a file or a folder below root) stands for."""
    path = root / where
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def violations(root: Path, layer: Layer) -> list[str]:
    """What breaks the rule, one sentence an import; empty when all is well."""
    found = []
    for path in python_files(root, layer.where):
        place = path.relative_to(root).as_posix()
        if any(_covers(exempt, place, "/") for exempt in layer.but_for):
            continue
        for line, name in imports_of(path.read_text()):
            broken = [rule for rule in layer.forbidden if _covers(rule, name, ".")]
            if broken and not any(_covers(door, name, ".") for door in layer.doors):
                found.append(f"{place}:{line} imports {name}: {layer.where} must not import {broken[0]}")
    return found


def relative_imports(root: Path, where: str) -> list[str]:
    """The places below `where` that import relatively."""
    return [
        f"{path.relative_to(root).as_posix()}:{found.line} imports relatively; name the module in full"
        for path in python_files(root, where)
        for found in imports_of(path.read_text())
        if not found.name
    ]


def _covers(rule: str, name: str, separator: str) -> bool:
    return name == rule or name.startswith(rule + separator)
