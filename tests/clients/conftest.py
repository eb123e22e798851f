"""One running server for all client tests, and an environment of their own for clients with old needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.running import RunningServer
from tests.clients.served_model import ServedModel, make_served_model

# They pin certifi and huggingface-hub to versions of 2024, so they are installed apart and without their needs.
OLD_CLIENTS = ["lorax-client==0.6.3", "text-generation==0.7.0"]
THEIR_NEEDS = ["aiohttp", "aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return make_served_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def server(model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("server")
    arguments = [str(model.base), "--adapters-dir", str(model.adapters), "--store-dir", str(root / "store")]
    with RunningServer(root, [*arguments, "--pool-bytes", "64M", "--served-model-name", "tiny"]) as running:
        yield running


@pytest.fixture(scope="session")
def old_clients(pytestconfig: pytest.Config) -> Path:
    """A directory to put on PYTHONPATH; kept between runs."""
    assert pytestconfig.cache is not None
    directory = pytestconfig.cache.mkdir("old-clients")
    if (directory / "lorax").is_dir() and (directory / "text_generation").is_dir():
        return directory
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
    installed = subprocess.run([*command, *OLD_CLIENTS, *THEIR_NEEDS], capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        pytest.skip(f"the package index cannot be reached: {installed.stderr[-300:]}")
    return directory
