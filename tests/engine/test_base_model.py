"""Which bases are served, which are refused, and how the self-check finds out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from server.engine import paged_attention as paged_module
from server.engine import self_check as self_check_module
from server.engine.assembly import build_engine
from server.engine.base_model import max_model_len, refuse_unservable
from server.engine.config import EngineConfig
from server.engine.errors import EngineStartError
from server.engine.model_runner import ModelRunner
from server.engine.paged_attention import UnknownAttentionArgument, paged_attention
from tests.tiny_engine import Ask, TinyEngine
from tests.tiny_models import REFUSED_ARCHITECTURES, make_model, random_prompt

ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


def build(model: PreTrainedModel, directory: Path, **values: Any) -> Any:
    model.save_pretrained(directory / "base")
    config = EngineConfig(model=str(directory / "base"), dtype="float32", pool_bytes=8 << 20, num_threads=1, **values)
    return build_engine(config, lambda stage, fraction: None)


@pytest.mark.parametrize("arch", REFUSED_ARCHITECTURES)
def test_a_model_that_never_calls_our_attention_is_refused(arch: str, tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="attention interface"):
        build(make_model(arch), tmp_path)


def test_a_model_that_claims_support_and_does_not_call_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("bloom")
    monkeypatch.setattr(type(model), "_supports_attention_backend", True)
    with pytest.raises(EngineStartError, match="layers that attend"):
        build(model, tmp_path, max_model_len=64)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_rope_that_depends_on_the_longest_neighbour_is_capped(rope_type: str) -> None:
    extra = LONGROPE if rope_type == "longrope" else {}
    config = LlamaConfig(max_position_embeddings=2048, rope_parameters={"rope_type": rope_type, **ROPE, **extra})
    assert max_model_len(config, None) == 512
    with pytest.raises(EngineStartError, match=f"2048 is more than 512, its {rope_type} RoPE"):
        max_model_len(config, 2048)


def test_a_rope_that_does_not_depend_on_neighbours_keeps_its_length() -> None:
    config = LlamaConfig(max_position_embeddings=2048, rope_parameters={"rope_type": "yarn", **ROPE})
    assert max_model_len(config, None) == 2048
    assert max_model_len(config, 100) == 100


def test_state_space_layers_are_refused_by_name() -> None:
    config = LlamaConfig(layer_types=["full_attention", "linear_attention"], num_hidden_layers=2)
    with pytest.raises(EngineStartError, match="linear_attention"):
        refuse_unservable(config)


def test_a_dynamic_rope_model_serves_rows_that_do_not_see_their_neighbours(tmp_path: Path) -> None:
    model = make_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0})
    engine = TinyEngine(model, tmp_path, chunk_size=32, enable_prefix_caching=False)
    ask = Ask("a", random_prompt(9), None, 4)
    alone = engine.run([ask])["a"]
    crowd = engine.run([ask, Ask("b", random_prompt(700, seed=1), None, 4)])["a"]
    assert np.array_equal(alone.logprobs, crowd.logprobs)


def test_a_missing_model_is_told_in_a_sentence() -> None:
    with pytest.raises(EngineStartError, match="neither a directory here nor a model"):
        build_engine(EngineConfig(model="/nowhere/at all"), lambda stage, fraction: None)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_model_that_cannot_be_read_is_told_in_a_sentence(missing: str, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(EngineStartError, match="cannot be read"):
        build_engine(EngineConfig(model=str(tmp_path)), lambda stage, fraction: None)


def test_damaged_weights_are_told_in_a_sentence(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(EngineStartError, match="cannot be read"):
        build_engine(EngineConfig(model=str(tmp_path)), lambda stage, fraction: None)


def test_a_pool_too_small_to_be_useful_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(EngineStartError, match="--pool-bytes"):
        build_engine(
            EngineConfig(model=str(tmp_path / "base"), pool_bytes=4096, num_threads=1), lambda stage, fraction: None
        )


@pytest.mark.parametrize("arch", ["gemma2", "mistral"])
def test_the_self_check_refuses_what_differs(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that looks at one key too few."""

    def short_sighted(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
        mask[..., 0] = -torch.inf
        return mask

    monkeypatch.setattr(paged_module, "_additive", short_sighted)
    with pytest.raises(EngineStartError, match="served wrongly"):
        build(make_model(arch), tmp_path)


def test_the_self_check_counts_a_call_per_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = self_check_module.STEPS
    assert len(calls) == 4
    original = paged_module._Call.write

    def twice(self: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        self.paged.layer_calls[self.layer] += 1
        original(self, key, value)

    monkeypatch.setattr(paged_module._Call, "write", twice)
    with pytest.raises(EngineStartError, match="exactly once"):
        build(make_model("llama"), tmp_path)


def test_the_self_check_refuses_logits_that_are_not_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ModelRunner.forward

    def broken(self: Any, batch: Any) -> torch.Tensor:
        logits = original(self, batch)
        logits[-1, 7] = torch.nan
        return logits

    monkeypatch.setattr(ModelRunner, "forward", broken)
    with pytest.raises(EngineStartError, match="by nan"):
        build(make_model("llama"), tmp_path)


def test_a_sliding_window_that_attention_is_not_told_of_is_refused(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=256, eos_token_id=None, use_sliding_window=True, sliding_window=32, **experts, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(EngineStartError, match=r"slides over 32 tokens in layers \[0\]"):
        build(model, tmp_path / "long")
    build(model, tmp_path / "short", max_model_len=32)  # the window cannot matter


@pytest.mark.parametrize(("given", "kept"), [(50256, ()), (-1, ()), ([7, 300, -1], (7,)), (0, (0,))])
def test_ends_of_sequence_outside_of_the_vocabulary_end_nothing(given: Any, kept: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "base" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": given}))
    config = EngineConfig(model=str(tmp_path / "base"), pool_bytes=8 << 20, num_threads=1)
    assert build_engine(config, lambda stage, fraction: None)[1].eos_token_ids == kept


@pytest.mark.parametrize(
    "unknown", [{"attn_bias": 1}, {"dropout": 0.1}, {"is_causal": False}, {"attention_mask": torch.ones(1)}]
)
def test_an_attention_argument_that_we_do_not_know_is_an_error(unknown: dict[str, Any]) -> None:
    tensor = torch.zeros(1, 1, 1, 4)
    arguments = {"attention_mask": None, **unknown}
    with pytest.raises(UnknownAttentionArgument, match=next(iter(unknown))):
        paged_attention(torch.nn.Identity(), tensor, tensor, tensor, **arguments)
