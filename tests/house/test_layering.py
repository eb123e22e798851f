"""The house's layers hold: who must not import whom, by the text of the files and by running them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.layers import LAYERS, TORCH_FREE, Layer, imports_of, relative_imports, violations

ROOT = Path(__file__).parents[2]
PACKAGES = ("peft_core", "adapters_store", "server", "bench")


def plant(root: Path, where: str, text: str) -> None:
    """Write a file with this text where the rule looks."""
    path = root / where if where.endswith(".py") else root / where / "planted.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.where)
def test_a_layer_imports_nothing_that_it_must_not_know(layer: Layer) -> None:
    assert (ROOT / layer.where).exists(), f"the rule for {layer.where} watches nothing"
    assert violations(ROOT, layer) == []


@pytest.mark.parametrize("where", TORCH_FREE)
def test_the_torch_free_half_does_not_import_torch(where: str) -> None:
    assert (ROOT / where).exists(), f"the rule for {where} watches nothing"
    assert violations(ROOT, Layer(where, ("torch",))) == []


@pytest.mark.parametrize("where", PACKAGES)
def test_imports_are_absolute(where: str) -> None:
    assert relative_imports(ROOT, where) == []


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.where)
def test_a_planted_import_is_found_in_every_layer_for_every_forbidden_name(layer: Layer, tmp_path: Path) -> None:
    for name in layer.forbidden:
        plant(tmp_path, layer.where, f"import {name}\n")
        assert violations(tmp_path, layer), f"`import {name}` went unseen in {layer.where}"
        plant(tmp_path, layer.where, f"def late() -> None:\n    from {name} import thing\n")
        assert violations(tmp_path, layer), f"a late `from {name} import thing` went unseen in {layer.where}"


def test_a_planted_torch_is_found_under_type_checking_too(tmp_path: Path) -> None:
    plant(tmp_path, "server/api", "if TYPE_CHECKING:\n    import torch.nn\n")
    assert violations(tmp_path, Layer("server/api", ("torch",))) == [
        "server/api/planted.py:2 imports torch.nn: server/api must not import torch"
    ]


def test_a_planted_relative_import_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "server", "from . import engine\n")
    assert relative_imports(tmp_path, "server") == ["server/planted.py:1 imports relatively; name the module in full"]


def test_the_doors_of_the_engine_open_and_the_rest_stays_shut(tmp_path: Path) -> None:
    api = next(layer for layer in LAYERS if layer.where == "server/api")
    plant(tmp_path, "server/api", "from server.engine.client import EngineClient\nfrom server.engine import request\n")
    assert violations(tmp_path, api) == []
    plant(tmp_path, "server/api", "from server.engine.client_secrets import key\n")
    assert violations(tmp_path, api), "a door must not open every name that begins like it"
    plant(tmp_path, "server/api", "from server import engine\n")
    assert violations(tmp_path, api), "the whole engine must not come in by its package"


def test_names_that_only_begin_like_a_forbidden_one_are_allowed(tmp_path: Path) -> None:
    plant(tmp_path, "adapters_store", "import torchless\nfrom peft_corelike import thing\n")
    assert violations(tmp_path, Layer("adapters_store", ("torch", "peft_core"))) == []


def test_imports_are_read_with_their_lines() -> None:
    source = "import os, json as j\nfrom a.b import c as d\nfrom . import e\n"
    assert [tuple(found) for found in imports_of(source)] == [(1, "os"), (1, "json"), (2, "a.b.c"), (3, "")]


TORCH_FREE_MODULES = (
    "server.api.app",
    "server.front.front",
    "server.engine.client",
    "server.library.library",
    "server.__main__",
    "adapters_store.catalog",
)


@pytest.mark.parametrize("module", TORCH_FREE_MODULES)
def test_the_front_process_starts_without_loading_torch(module: str) -> None:
    assert importlib.util.find_spec(module) is not None, f"{module} is not there any more; name its successor here"
    assert not _loads_torch(module)


def test_a_module_that_loads_torch_is_noticed() -> None:
    assert _loads_torch("peft_core.forms")


def _loads_torch(module: str) -> bool:
    """Whether importing the module in a fresh interpreter brings torch in, by whatever way."""
    program = f"import sys, {module}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip() == "True"
