"""A spec says which modules a base has, of any architecture, and survives the way through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_core.spec import BaseModelSpec, Site
from tests.peft_core.adapter_files import shared_model, shared_spec
from tests.tiny_models import ARCHITECTURES, MAX_POSITION, SERVED_ARCHITECTURES, VOCAB


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_module_is_a_site_or_listed(arch: str) -> None:
    model, spec = shared_model(arch), shared_spec(arch)
    modules = {path: module for path, module in model.named_modules() if path}
    linears = {path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    assert linears == {path for path, site in spec.sites.items() if site.kind != "embedding"}
    assert set(modules) <= {*spec.sites, *spec.other_modules}
    assert not {*spec.sites} & {*spec.other_modules}
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (3, 64, VOCAB)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sizes_are_those_that_a_row_sees(arch: str) -> None:
    for path, site in shared_spec(arch).sites.items():
        module = shared_model(arch).get_submodule(path)
        weight = module.get_parameter("weight")
        stored = tuple(reversed(weight.shape)) if site.transposed else tuple(weight.shape)
        logical = (site.out_features, site.in_features)
        assert stored == (logical[::-1] if site.kind == "embedding" else logical)
        assert site.has_bias == (getattr(module, "bias", None) is not None)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_there_is_one_head_and_it_makes_the_logits(arch: str) -> None:
    spec = shared_spec(arch)
    (head,) = [site for site in spec.sites.values() if site.kind == "head"]
    model: Any = shared_model(arch)
    assert model.get_submodule(head.path) is model.get_output_embeddings()
    assert head.out_features == VOCAB
    assert spec.tie_word_embeddings == model.config.tie_word_embeddings


def test_gpt2_is_transposed_and_fused() -> None:
    spec = shared_spec("gpt2")
    path = "transformer.h.0.attn.c_attn"
    assert spec.sites[path] == Site(path, "linear", 64, 192, has_bias=True, transposed=True)
    assert spec.sites["transformer.wpe"] == Site(
        "transformer.wpe", "embedding", MAX_POSITION, 64, has_bias=False, transposed=False
    )
    assert not any(site.transposed for site in shared_spec("llama").sites.values())


@pytest.mark.parametrize("arch", SERVED_ARCHITECTURES)
def test_only_expert_weights_are_listed_as_parameters(arch: str) -> None:
    modules = {path for path, _ in shared_model(arch).named_modules()}
    parameters = [path for path in shared_spec(arch).other_modules if path not in modules]
    assert all(".experts." in path for path in parameters)
    assert bool(parameters) == (arch in ("mixtral", "qwen3_moe"))


def test_positions_may_be_unbounded() -> None:
    assert shared_spec("bloom").max_position is None
    assert shared_spec("gpt2").max_position == MAX_POSITION


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_json_gives_the_same_spec_back(arch: str) -> None:
    spec = dataclasses.replace(shared_spec(arch), input_groups=(("a.q", "a.k"), ("a.v",)))
    again = BaseModelSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert list(again.sites) == list(spec.sites)
    assert again != shared_spec("qwen2" if arch != "qwen2" else "llama")


def test_a_scaled_embedding_is_an_embedding() -> None:
    assert type(shared_model("gemma3").get_input_embeddings()) is not nn.Embedding
    assert shared_spec("gemma3").sites["model.embed_tokens"].kind == "embedding"
