"""`veneer adapters inspect` and `convert`, as a user runs them: what is printed, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from server.cli import app
from server.inspection import inspect_on
from tests.clients.served_model import ServedModel, make_served_model
from tests.tiny_models import make_lora, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return make_served_model(tmp_path_factory.mktemp("inspected"))


def adapters(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["adapters", *map(str, arguments)])


def veneer(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As `adapters`, in a process of its own: an engine wants real streams."""
    command = [sys.executable, "-m", "server", "adapters", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def edit(source: Path, directory: Path, factor: float = 1.0, **fields: Any) -> Path:
    """A copy with other config fields, its weights B times a factor."""
    directory.mkdir()
    config = json.loads((source / "adapter_config.json").read_text()) | fields
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(source / "adapter_model.safetensors")
    tensors = {name: value * factor if "lora_B" in name else value for name, value in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_on_a_base_it_is_said_what_it_costs_and_how_far_it_goes(model: ServedModel) -> None:
    done = veneer("inspect", model.guest, "--base", model.base, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["served"], found["reason"]) == (0, True, None)
    report = found["report"]
    assert (report["kind"], report["ranks"], len(report["sites"])) == ("LORA", [8], 12)
    assert report["device_bytes"] > 0
    assert report["probe"]["largest_change"] > 0.01
    assert report["warnings"] == []


def test_an_adapter_without_an_effect_is_told(model: ServedModel, tmp_path: Path) -> None:
    report = inspect_on(edit(model.guest, tmp_path / "zero", 0.0), str(model.base)).report
    assert report["probe"]["largest_change"] == 0
    warnings = " ".join(report["warnings"])
    assert "changes nothing" in warnings
    assert "does not move" in warnings


def test_a_refusal_is_an_answer_with_its_reason_and_a_status(model: ServedModel, tmp_path: Path) -> None:
    done = veneer("inspect", edit(model.guest, tmp_path / "x", layer_replication=[[0, 2]]), "--base", model.base)
    assert done.returncode == 1
    assert "no: " in done.stdout
    assert "layer_replication" in done.stdout


def test_what_is_no_adapter_or_no_base_is_an_error_without_a_trace(model: ServedModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80")
    for arguments, words in (
        ((tmp_path / "empty",), "adapter_config.json"),
        ((tmp_path / "pickled",), "veneer adapters convert"),
        ((model.guest, "--base", tmp_path / "empty"), "cannot be read"),
    ):
        result = adapters("inspect", *arguments)
        assert (result.exit_code, words in result.stderr) == (1, True), result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.output
    assert adapters("inspect", tmp_path / "nowhere").exit_code == 2


def test_a_revision_of_no_base_is_wrong_usage(model: ServedModel, tmp_path: Path) -> None:
    for arguments in (("inspect", model.guest), ("convert", model.guest, tmp_path / "x")):
        result = adapters(*arguments, "--revision", "v2")
        assert (result.exit_code, "--base" in result.stderr) == (2, True), result.output
    assert not (tmp_path / "x").exists()


def test_a_pickled_adapter_is_converted_and_then_taken(model: ServedModel, tmp_path: Path) -> None:
    make_lora(make_model("llama", seed=1, vocab_size=300), tmp_path / "src", targets=["q_proj"])
    tensors = load_file(tmp_path / "src" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "src" / "adapter_model.bin")
    (tmp_path / "src" / "adapter_model.safetensors").unlink()
    done = adapters("convert", tmp_path / "src", tmp_path / "dst")
    assert done.exit_code == 0, done.output
    assert "without running its code" in done.stdout
    assert adapters("inspect", tmp_path / "dst").exit_code == 0
    again = adapters("convert", tmp_path / "src", tmp_path / "dst")
    assert (again.exit_code, "exists already" in again.stderr) == (1, True)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused = adapters("convert", tmp_path / "x.gguf", tmp_path / "y")
    assert (refused.exit_code, "GGUF is not converted" in refused.stderr) == (1, True)
