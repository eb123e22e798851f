from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from server.loader.effect import canonical_config, effect_digest
from server.loader.tensor_file import TensorFile
from tests.library.library_samples import make_config, make_tensors


def digest_of(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], **irrelevant: list[str]) -> str:
    path.write_bytes(save(tensors))
    return effect_digest(config, TensorFile(path), **irrelevant)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def test_what_does_not_change_the_outputs_does_not_change_the_effect(path: Path) -> None:
    tensors, config = make_tensors(), make_config()
    plain = digest_of(path, tensors, config)
    reordered = dict(reversed(list(config.items()))) | {"target_modules": ["v_proj", "q_proj"]}
    renamed = config | {"base_model_name_or_path": "/elsewhere", "alpha_pattern": None, "rank_pattern": {}, "x": None}
    assert digest_of(path, dict(reversed(list(tensors.items()))), reordered) == plain
    assert digest_of(path, tensors, renamed) == plain
    assert digest_of(path, tensors, config | {"peft_version": "9"}, irrelevant_fields=["peft_version"]) == plain
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    assert effect_digest(config, TensorFile(path)) == plain


def test_what_changes_the_outputs_changes_the_effect(path: Path) -> None:
    tensors, config = make_tensors(), make_config()
    digests = {digest_of(path, tensors, config)}
    first = next(iter(tensors))
    nudged = tensors | {first: tensors[first].clone()}
    nudged[first][0, 0] += 1e-6
    for other in (nudged, {name: value.to(torch.float16) for name, value in tensors.items()}):
        digests.add(digest_of(path, other, config))
    moved = {("other" + name if name == first else name): value for name, value in tensors.items()}
    digests.add(digest_of(path, moved, config))
    for field in (
        {"lora_alpha": 16},
        {"use_rslora": True},
        {"target_modules": ["q_proj"]},
        {"alpha_pattern": {"q": 1}},
        {"alora_invocation_tokens": [1, 2]},
        {"alora_invocation_tokens": [2, 1]},
        {"trainable_token_indices": {"wte": [5, 3]}},
        {"trainable_token_indices": {"wte": [3, 5]}},
        {"use_cayley_neumann": False},  # its default is true
        {"lora_alpha": 0},  # its default is 8
    ):
        digests.add(digest_of(path, tensors, config | field))
    assert len(digests) == 14


def test_the_order_of_patterns_matters_and_that_of_sets_does_not() -> None:
    one, two = {"rank_pattern": {"a": 1, "b": 2}}, {"rank_pattern": {"b": 2, "a": 1}}
    assert canonical_config(one) != canonical_config(two)
    assert canonical_config({"layers_to_transform": [1, 0]}) == canonical_config({"layers_to_transform": [0, 1]})
    assert json.loads(canonical_config({"r": 4, "seed": 1}, ["seed"])) == {"r": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_tensors_are_read_as_they_were_saved(path: Path, dtype: torch.dtype) -> None:
    saved = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "odd": torch.ones(3, dtype=dtype),
    }
    path.write_bytes(save(saved))
    tensors = TensorFile(path)
    for name, tensor in saved.items():
        assert torch.equal(tensors.get(name), tensor)
        assert b"".join(tensors.chunks(name)) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
