"""Pickled weights: what they hold comes out exactly, what they would run does not, and greed has bounds."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from server.convert.errors import ConversionRefused
from server.convert.pickle_file import unpickle


class Bomb:
    """Runs a command when it is unpickled by a reader that trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_tensors_come_out_exactly_shared_and_transposed_ones_too(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    tensors = {"a": matrix, "b": matrix.T, "c": matrix[1:3], "half": matrix.bfloat16(), "ids": torch.arange(3)}
    torch.save(tensors, tmp_path / "x.bin")
    assert unpickle(tmp_path / "x.bin", tmp_path / "x.safetensors") == 5
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Bomb(mark)}, tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("x.bin", "y.bin"):
        with pytest.raises(ConversionRefused, match="cannot be read as plain tensors"):
            unpickle(tmp_path / name, tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads((tmp_path / "y.bin").read_bytes())  # the control: the bomb is one
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "holds a list"),
        ({"a": 3}, "no plain tensor"),
        ({"a": {"b": torch.ones(2)}}, "no plain tensor"),
        ({7: torch.ones(2)}, "which is none"),
        ({"a": torch.ones(2, 2).to_sparse()}, "no plain tensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "no plain tensor"),
        ({}, "holds no tensor"),
    ],
)
def test_anything_but_a_flat_dictionary_of_tensors_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ConversionRefused, match=words):
        unpickle(tmp_path / "x.bin", tmp_path / "out")


def test_a_small_file_that_unpacks_to_terabytes_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").stat().st_size < 10_000
    with pytest.raises(ConversionRefused, match="memory"):
        unpickle(tmp_path / "x.bin", tmp_path / "out")


def test_a_reader_that_hangs_is_ended(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(ConversionRefused, match="within 0 s"):
        unpickle(tmp_path / "x.bin", tmp_path / "out", timeout_s=0.01)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"PK\x03\x04cut short"])
def test_damage_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ConversionRefused, match=r"x\.bin: it cannot be read"):
        unpickle(tmp_path / "x.bin", tmp_path / "out")


def test_damage_that_the_reader_has_no_words_for_is_told(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4, 4)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[: whole.index(b"protocol_version")])
    with pytest.raises(ConversionRefused, match="cannot be read as plain tensors"):
        unpickle(tmp_path / "x.bin", tmp_path / "out")
