"""LoRA as programs other than PEFT write it, or as they have PEFT write it: NeMo, Unsloth, LLaMA-Factory, vLLM, ..."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from peft_core.errors import AdapterError, MalformedAdapter, UnsupportedAdapter
from peft_core.methods import check
from server.library.directory import AdapterDirectory
from tests.peft_core.adapter_files import LoadedTensors, load_adapter, logits_of, read_adapter, write_adapter
from tests.peft_core.lora_samples import PROMPT, assert_equals_peft, decoded, logits_with, spec_of, tiny_base
from tests.tiny_models import load_oracle, make_lora, make_model, wrap

SAME = 1e-4


def report_warnings(model: PreTrainedModel, directory: Path, **fields: Any) -> tuple[str, ...]:
    config, tensors = read_adapter(directory)
    return check(config | fields, tensors.header, spec_of(model)).warnings


def refusal(model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AdapterError:
    with pytest.raises(AdapterError) as error:
        check(config, LoadedTensors(tensors).header, spec_of(model))
    return error.value


# NeMo: its exporter to PEFT's format leaves the adapter's name in, and writes few fields


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_nemo_leaves_the_adapter_s_name_in_the_names_of_tensors(arch: str, tmp_path: Path) -> None:
    model = tiny_base(arch)
    config, tensors = load_adapter(make_lora(model, tmp_path / "peft", rank=5, alpha=20))
    named = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    few = {"peft_type", "r", "lora_alpha", "target_modules", "bias", "task_type", "base_model_name_or_path"}
    directory = write_adapter(tmp_path / "nemo", {name: config[name] for name in few}, named)
    assert_equals_peft(model, directory)
    ours, theirs = decoded(model, directory).forms, decoded(model, tmp_path / "peft").forms
    assert ours.linear.keys() == theirs.linear.keys()
    assert all(torch.equal(ours.linear[path].up, theirs.linear[path].up) for path in ours.linear)


def test_a_factor_under_both_names_is_refused(tmp_path: Path) -> None:
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path))
    name = next(iter(tensors))
    twice = {**tensors, name.replace(".weight", ".default.weight"): tensors[name]}
    assert isinstance(refusal(model, config, twice), MalformedAdapter)


def test_megatron_s_own_checkpoint_is_refused_by_its_names(tmp_path: Path) -> None:
    model = tiny_base("llama")
    config, _ = load_adapter(make_lora(model, tmp_path, targets=["q_proj"]))
    prefix = "decoder.layers.0.self_attention.linear_qkv.adapter"
    megatron = {
        f"{prefix}.linear_in.weight": torch.zeros(4, 64),
        f"{prefix}.linear_out.weight": torch.zeros(128, 4),
    }
    error = refusal(model, config, megatron)
    assert error.tensor is not None
    assert error.tensor.startswith("decoder.")
    assert "save_pretrained" in str(error)


# Unsloth: long patterns, its own copies of bases, tables as replaced modules, a mark in auto_mapping

UNSLOTH_PATTERN = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


def test_unsloth_s_pattern_and_mark_are_read(tmp_path: Path) -> None:
    model = tiny_base("qwen2")
    make_lora(model, tmp_path, targets=UNSLOTH_PATTERN)
    config, tensors = load_adapter(tmp_path)
    config["auto_mapping"] = {
        "base_model_class": "Qwen2ForCausalLM",
        "parent_library": "transformers.models.qwen2.modeling_qwen2",
        "unsloth_fixed": True,
    }
    write_adapter(tmp_path, config, tensors)
    report = assert_equals_peft(model, tmp_path).report
    assert len(report.sites) == 3 * 7
    assert "auto_mapping" in report.irrelevant_fields


@pytest.mark.parametrize("name", ["unsloth/Tiny-Base-bnb-4bit", "unsloth/tiny-base-unsloth-bnb-4bit", "org/Tiny-Base"])
def test_a_quantised_copy_of_the_base_is_the_base(name: str, tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.name_or_path = "org/tiny-base"
    make_lora(model, tmp_path, targets=["q_proj"])
    assert report_warnings(model, tmp_path, base_model_name_or_path=name) == ()
    (warning,) = report_warnings(model, tmp_path, base_model_name_or_path="unsloth/other-base-bnb-4bit")
    assert "other-base" in warning


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tables_that_unsloth_trains_are_replaced_modules(tied: bool, tmp_path: Path) -> None:
    model = tiny_base("qwen2", tied=tied)
    fields = {"ensure_weight_tying": True} if tied else {}
    make_lora(model, tmp_path, targets=["q_proj", "up_proj"], modules_to_save=["embed_tokens", "lm_head"], **fields)
    forms = assert_equals_peft(model, tmp_path, tolerance=SAME).forms
    assert "model.embed_tokens" in forms.embeddings
    assert "lm_head" in forms.changes


# LLaMA-Factory: `additional_target` is modules_to_save; PiSSA is converted when it is saved; files of the trainer


def test_an_additional_target_of_llama_factory_is_a_replaced_module(tmp_path: Path) -> None:
    model = tiny_base("llama")
    make_lora(model, tmp_path, targets=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "norm"])
    assert_equals_peft(model, tmp_path, tolerance=SAME)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora"])
def test_a_converted_initialisation_is_a_plain_adapter_of_twice_the_rank(start: Any, tmp_path: Path) -> None:
    model = tiny_base("llama")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM")
    adapted: Any = wrap(model, config)
    adapted.peft_config["default"].init_lora_weights = True  # as LLaMA-Factory does, to keep where training began
    adapted.save_pretrained(str(tmp_path / "pissa_init"))
    trained: Any = adapted.train(mode=False)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    expected = logits_of(trained, PROMPT)
    adapted.peft_config["default"].init_lora_weights = start
    with warnings.catch_warnings():  # PEFT's own, of adapters that change the base
        warnings.simplefilter("ignore")
        trained.save_pretrained(
            str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "pissa_init")
        )
    report = assert_equals_peft(model, tmp_path / "converted").report
    assert report.ranks == (6,)
    assert not report.needs_base
    forms = decoded(model, tmp_path / "converted", with_base=False).forms
    assert (logits_with(model, forms) - expected).abs().max() <= SAME


def test_files_of_the_trainer_are_not_copied(tmp_path: Path) -> None:
    make_lora(tiny_base("llama"), tmp_path / "a", targets=["q_proj"])
    others = (
        "training_args.bin",
        "value_head.safetensors",
        "value_head.bin",
        "trainer_state.json",
        "additional_config.json",  # ms-swift
        "all_results.json",
    )
    for name in others:
        (tmp_path / "a" / name).write_bytes(b"{}")
    files = AdapterDirectory("a", tmp_path / "a").source().stamp
    assert files is not None
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    assert files.keys().isdisjoint(others)


# Fields that other programs add


@pytest.mark.parametrize(
    "field", ["vllm_lora_extra_vocab_size", "vllm_long_context_scaling_factor", "context_length", "lora_dtype"]
)
def test_a_field_that_may_change_the_outputs_is_refused_unless_off(field: str, tmp_path: Path) -> None:
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path, targets=["q_proj"]))
    error = refusal(model, config | {field: 4}, tensors)
    assert isinstance(error, UnsupportedAdapter)
    assert error.field == field
    assert check(config | {field: None}, LoadedTensors(tensors).header, spec_of(model)).irrelevant_fields[field]


def test_patterns_are_honoured_where_other_servers_take_one_scaling(tmp_path: Path) -> None:
    """vLLM multiplies every module by lora_alpha / r of the config, whatever the patterns say."""
    model = tiny_base("llama")
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}
    make_lora(model, tmp_path, rank=4, alpha=8, targets=["q_proj", "v_proj"], **patterns)
    report = assert_equals_peft(model, tmp_path).report
    assert {site.scaling for site in report.sites} == {4.0, 8.0}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    one_scaling = write_adapter(tmp_path / "one", config | {"alpha_pattern": {"q_proj": 4}}, load_adapter(tmp_path)[1])
    difference = logits_of(load_oracle(model, one_scaling), PROMPT) - logits_of(load_oracle(model, tmp_path), PROMPT)
    assert difference.abs().max() > SAME
