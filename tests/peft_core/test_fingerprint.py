"""A fingerprint changes with the weights and the architecture, and with nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_core.fingerprint import fingerprint_of_files, fingerprint_of_model
from tests.tiny_models import make_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_copy_has_the_same_fingerprint_and_other_weights_another(directory: Path, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "copy")
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    first = fingerprint_of_files(directory)
    assert first.startswith("sha256:")
    assert fingerprint_of_files(tmp_path / "copy") == first
    assert fingerprint_of_files(tmp_path / "other") != first


def test_notes_of_the_writing_program_do_not_count(directory: Path) -> None:
    before = fingerprint_of_files(directory)
    edit_config(directory, transformers_version="9.9", _name_or_path="elsewhere")
    (directory / "README.md").write_text("notes")
    assert fingerprint_of_files(directory) == before
    edit_config(directory, rope_theta=5.0)
    assert fingerprint_of_files(directory) != before


def test_a_renamed_tensor_and_a_changed_last_value_count(directory: Path) -> None:
    path = directory / "model.safetensors"
    before, tensors = fingerprint_of_files(directory), load_file(path)
    save_file({("x" + name if name == "lm_head.weight" else name): value for name, value in tensors.items()}, path)
    assert fingerprint_of_files(directory) != before
    save_file(tensors, path)
    renewed = fingerprint_of_files(directory)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert fingerprint_of_files(directory) != renewed


def test_what_cannot_be_identified_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="safetensors"):
        fingerprint_of_files(tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut short"):
        fingerprint_of_files(directory)
    path.write_bytes(b"\x01")
    with pytest.raises(ValueError, match="cut short"):
        fingerprint_of_files(directory)


def test_a_model_in_memory_is_told_by_its_weights_and_dtype() -> None:
    first = fingerprint_of_model(make_model("gpt2"))
    assert fingerprint_of_model(make_model("gpt2")) == first
    assert fingerprint_of_model(make_model("gpt2", seed=1)) != first
    assert fingerprint_of_model(make_model("gpt2").bfloat16()) != first
    assert fingerprint_of_model(make_model("gpt2", n_head=2)) != first
    changed = make_model("gpt2")
    with torch.no_grad():
        changed.get_submodule("transformer.ln_f").get_parameter("bias")[-1] += 1
    assert fingerprint_of_model(changed) != first
