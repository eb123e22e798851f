"""Every tensor of a file is used, known to be irrelevant, or named in a refusal; so is every value in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods import check, decode
from tests.peft_core.adapter_files import (
    FileTensors,
    LoadedTensors,
    SavedAdapter,
    applied,
    logits_of,
    read_adapter,
    relative_error,
    shared_model,
    shared_spec,
)
from tests.tiny_models import load_oracle, make_lora, random_prompt

PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> SavedAdapter:
    saved = SavedAdapter(tmp_path, targets=["q_proj"])
    assert len(saved.check().sites) == 3  # so whatever a test sees refused below is refused for its change
    return saved


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "lora_bias"),
        ("model.layers.0.self_attn.q_proj.lora_diag", "KaSA"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices"),
        ("model.layers.0.mlp.act_fn.weight", "no linear, embedding, head or norm"),
        ("model.layers.0.self_attn.q_proj.hada_w1_a", "unknown"),
        ("model.layers.0.self_attn.q_proj.lora_C.weight", "modules"),
    ],
)
def test_a_planted_tensor_is_refused_by_name(name: str, feature: str, adapter: SavedAdapter) -> None:
    adapter.tensors[PREFIX + name] = torch.ones(4)
    error = adapter.refusal()
    assert isinstance(error, UnsupportedAdapter)
    assert error.tensor == PREFIX + name
    assert PREFIX + name in str(error)
    assert feature in str(error)


def test_tensors_that_only_training_uses_are_set_aside_and_told(adapter: SavedAdapter) -> None:
    names = (f"{Q0}.lora_velora_embed", f"{Q0}.lora_monteclora_sampler.mean")
    adapter.tensors |= {name: torch.ones(2) for name in names}
    report = adapter.check(velora_config={"num_groups": 8}, monteclora_config={"num_samples": 2})
    assert report.irrelevant_tensors == names
    assert report.sites == adapter.check().sites


@pytest.mark.parametrize(
    "options",
    [{"velora_config": {"num_groups": 4, "init_type": "random"}}, {"monteclora_config": {"num_samples": 2}}],
    ids=["velora", "monteclora"],
)
def test_methods_that_only_change_training_equal_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model, prompt = shared_model("llama"), random_prompt(20)
    directory = make_lora(model, tmp_path, targets=["q_proj"], **options)
    expected = logits_of(load_oracle(model, directory), prompt)
    with applied(model, decode(*read_adapter(directory), shared_spec("llama")).forms):
        assert relative_error(logits_of(model, prompt), expected) < 1e-5


def test_a_file_without_one_factor_is_refused(adapter: SavedAdapter) -> None:
    adapter.tensors = {}
    assert isinstance(adapter.refusal(), MalformedAdapter)
    assert "would do nothing" in str(adapter.refusal())


def test_a_wrong_prefix_is_refused_instead_of_serving_the_base(adapter: SavedAdapter) -> None:
    adapter.tensors = {name.removeprefix(PREFIX): value for name, value in adapter.tensors.items()}
    error = adapter.refusal()
    assert isinstance(error, MalformedAdapter)
    assert PREFIX in str(error)
    assert error.tensor in adapter.tensors


def test_a_module_that_the_base_lacks_is_a_mismatch(adapter: SavedAdapter) -> None:
    adapter.tensors = {name.replace("layers.2", "layers.31"): value for name, value in adapter.tensors.items()}
    error = adapter.refusal()
    assert isinstance(error, BaseMismatch)
    assert "model.layers.31.self_attn.q_proj" in str(error)


def test_an_adapter_of_another_architecture_is_a_mismatch(adapter: SavedAdapter) -> None:
    with pytest.raises(BaseMismatch, match="gpt2") as refusal:
        check(adapter.config, LoadedTensors(adapter.tensors).header, shared_spec("gpt2"))
    assert refusal.value.tensor in adapter.tensors


@pytest.mark.parametrize(("side", "shape"), [("A", (4, 96)), ("B", (96, 4))])
def test_another_size_is_a_mismatch_with_got_and_expected(
    side: str, shape: tuple[int, int], adapter: SavedAdapter
) -> None:
    adapter.tensors[f"{Q0}.lora_{side}.weight"] = torch.ones(shape)
    error = adapter.refusal()
    assert isinstance(error, BaseMismatch)
    assert error.tensor == f"{Q0}.lora_{side}.weight"
    assert str(list(shape)) in str(error)
    assert "64" in str(error)


@pytest.mark.parametrize(
    ("side", "value", "message"),
    [
        ("A", torch.ones(4), "two dimensions"),
        ("A", torch.ones(4, 8, 8), "two dimensions"),
        ("A", torch.ones(0, 64), "two dimensions"),
        ("A", torch.ones(4, 64, dtype=torch.int64), "dtype I64"),
        ("B", torch.ones(64, 5), "rank 5"),
    ],
)
def test_factors_that_do_not_go_together_are_malformed(
    side: str, value: torch.Tensor, message: str, adapter: SavedAdapter
) -> None:
    adapter.tensors[f"{Q0}.lora_{side}.weight"] = value
    error = adapter.refusal()
    assert isinstance(error, MalformedAdapter)
    assert (error.tensor, message in str(error)) == (f"{Q0}.lora_{side}.weight", True)


@pytest.mark.parametrize("side", ["A", "B"])
def test_half_a_pair_is_malformed(side: str, adapter: SavedAdapter) -> None:
    del adapter.tensors[f"{Q0}.lora_{side}.weight"]
    error = adapter.refusal()
    assert isinstance(error, MalformedAdapter)
    assert f"lora_{side}.weight of" in str(error)


def test_one_factor_under_two_names_is_malformed(adapter: SavedAdapter) -> None:
    adapter.tensors[f"{Q0}.lora_A.default.weight"] = adapter.tensors[f"{Q0}.lora_A.weight"]
    assert "under two names" in str(adapter.refusal())


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_refused_when_read(side: str, bad: float, adapter: SavedAdapter) -> None:
    name = f"{Q0}.lora_{side}.weight"
    source = LoadedTensors(adapter.tensors)
    assert decode(adapter.config, source, shared_spec("llama")).report == adapter.check()
    adapter.tensors[name][1, 2] = bad
    with pytest.raises(MalformedAdapter, match="NaN") as refusal:
        decode(adapter.config, source, shared_spec("llama"))
    assert refusal.value.tensor == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_beyond_float32_is_refused(dtype: torch.dtype, adapter: SavedAdapter) -> None:
    """In float64 the value itself is beyond; in float32 it becomes so by the scaling."""
    name = f"{Q0}.lora_B.weight"
    adapter.tensors[name] = torch.full((64, 4), 1e39 if dtype is torch.float64 else 3e38, dtype=dtype)
    with pytest.raises(MalformedAdapter, match="beyond float32"):
        decode(adapter.config, LoadedTensors(adapter.tensors), shared_spec("llama"))


def test_a_tensor_that_is_not_what_its_header_says_is_refused(adapter: SavedAdapter) -> None:
    class Lying(LoadedTensors):
        def get(self, name: str) -> torch.Tensor:
            return self.tensors[name][:-1]

    with pytest.raises(MalformedAdapter, match="announced"):
        decode(adapter.config, Lying(adapter.tensors), shared_spec("llama"))


def test_checking_reads_no_data(tmp_path: Path) -> None:
    config, tensors = read_adapter(make_lora(shared_model("llama"), tmp_path, targets=["q_proj"]))
    check(config, tensors.header, shared_spec("llama"))
    assert tensors.num_reads == 0
    decode(config, tensors, shared_spec("llama"))
    assert tensors.num_reads == 6


def test_a_refused_adapter_is_refused_before_its_data_is_read(tmp_path: Path) -> None:
    config, tensors = read_adapter(make_lora(shared_model("llama"), tmp_path, targets=["q_proj"]))
    with pytest.raises(UnsupportedAdapter, match="layer_replication"):
        decode(config | {"layer_replication": [[0, 2], [1, 3]]}, tensors, shared_spec("llama"))
    assert isinstance(tensors, FileTensors)
    assert tensors.num_reads == 0
