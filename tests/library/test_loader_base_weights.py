"""The base's weights from its files equal those of the loaded model, whatever the architecture and the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_core.errors import UnsupportedAdapter
from peft_core.spec import BaseModelSpec
from server.loader.base_weights import BaseFiles
from tests.tiny_models import SERVED_ARCHITECTURES, make_model


def open_base(model: PreTrainedModel, directory: Path, dtype: torch.dtype = torch.float32) -> BaseFiles:
    if not directory.exists():
        model.save_pretrained(directory)
    return BaseFiles(directory, BaseModelSpec.from_model(model, "test"), dtype)


def expected_weight(model: PreTrainedModel, path: str) -> torch.Tensor:
    module = model.get_submodule(path)
    weight: torch.Tensor = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


@pytest.mark.parametrize("arch", SERVED_ARCHITECTURES)
def test_every_weight_and_bias_is_the_models(tmp_path: Path, arch: str) -> None:
    model = make_model(arch, seed=5)
    spec = BaseModelSpec.from_model(model, "test")
    base = open_base(model, tmp_path / "base")
    for path in (*spec.sites, *spec.norms):
        weight = base.weight(path)
        assert weight.is_contiguous()
        assert torch.equal(weight, expected_weight(model, path)), path
    for path in (path for path, site in spec.sites.items() if site.kind != "embedding"):
        bias, expected = base.bias(path), getattr(model.get_submodule(path), "bias", None)
        assert (bias is None) == (expected is None), path
        if bias is not None:
            assert isinstance(expected, torch.Tensor)
            assert torch.equal(bias, expected), path
    for name, shape in spec.expert_parameters.items():
        assert tuple(base.weight(name).shape) == shape
        assert torch.equal(base.weight(name), model.get_parameter(name)), name


def test_stacked_experts_load_the_model_once_and_let_it_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mixtral", seed=5)
    base = open_base(model, tmp_path / "base")
    loaded: list[Path] = []
    from server.loader import base_weights

    original = base_weights._load

    def load(path: Path) -> Any:
        loaded.append(path)
        return original(path)

    monkeypatch.setattr(base_weights, "_load", load)
    names = list(BaseModelSpec.from_model(model, "test").expert_parameters)
    assert not any(name in base._find_places() for name in names), "the file holds them as the model does"
    for name in names:
        base.weight(name)
    assert len(loaded) == 1
    base.release()
    assert base._model is None


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    model = make_model("llama", seed=5)
    model.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    base = open_base(model, tmp_path / "base")
    for path in ("model.layers.2.mlp.down_proj", "lm_head", "model.embed_tokens", "model.norm"):
        assert torch.equal(base.weight(path), expected_weight(model, path))


def test_a_file_without_the_outermost_module_is_read_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gpt2", seed=5)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setattr("server.loader.base_weights._load", lambda path: pytest.fail("the model was loaded"))
    base = open_base(model, tmp_path / "base")
    path = "transformer.h.1.attn.c_attn"
    assert torch.equal(base.weight(path), expected_weight(model, path))
    assert torch.equal(base.weight("lm_head"), model.get_input_embeddings().weight)


def test_values_are_rounded_to_what_the_base_computes_with(tmp_path: Path) -> None:
    model = make_model("llama", seed=5)
    base = open_base(model, tmp_path / "base", torch.bfloat16)
    path = "model.layers.0.self_attn.q_proj"
    exact = expected_weight(model, path)
    assert torch.equal(base.weight(path), exact.bfloat16().float())
    assert not torch.equal(base.weight(path), exact)


def test_a_base_that_cannot_be_read_is_a_refusal(tmp_path: Path) -> None:
    model = make_model("llama", seed=5)
    base = BaseFiles(tmp_path / "nowhere", BaseModelSpec.from_model(model, "test"))
    with pytest.raises(UnsupportedAdapter, match="cannot be read"):
        base.weight("lm_head")


def test_a_module_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    base = open_base(make_model("llama", seed=5), tmp_path / "base")
    with pytest.raises(KeyError, match="no parameter"):
        base.weight("model.layers.9.self_attn.q_proj")
