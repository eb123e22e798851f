"""AdapterHub's adapters that are not served, and files that contradict themselves: each is refused by name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from peft_core.errors import AdapterError, BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods import DecodeReport, check, decode
from peft_core.spec import BaseModelSpec
from tests.adapterhub_goldens import CASES, DIRECTORY, golden_model, golden_spec, read_files, read_golden
from tests.tiny_engine import MemoryTensors, ModelWeights


class Spoilt:
    """A golden adapter in memory, with changes."""

    def __init__(self, base: str, name: str) -> None:
        self.base = base
        self.config, source = read_golden(base, name).files()
        self.tensors: dict[str, torch.Tensor] = source.tensors

    def set(self, **fields: Any) -> Spoilt:
        """Change fields of the method's configuration."""
        self.config["config"] |= fields
        return self

    def rename(self, old: str, new: str) -> Spoilt:
        self.tensors = {name.replace(old, new): value for name, value in self.tensors.items()}
        return self

    def check(self, spec: BaseModelSpec | None = None) -> DecodeReport:
        return check(self.config, MemoryTensors(self.tensors).header, spec or golden_spec(self.base))

    def decode(self) -> Any:
        base = ModelWeights(golden_model(self.base))
        return decode(self.config, MemoryTensors(self.tensors), golden_spec(self.base), base)

    def refusal(self, kind: type[AdapterError] = UnsupportedAdapter, spec: BaseModelSpec | None = None) -> AdapterError:
        with pytest.raises(kind) as refusal:
            self.check(spec)
        return refusal.value


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gated", "use_gating"),
        ("unipelt", "use_gating"),
        ("gated_lora", "use_gating"),
        ("invertible", "inv_adapter"),
        ("loreft", "architecture"),
        ("norm_of_everything", "residual_before_ln"),
        ("prefix_left_out", "leave_out"),
    ],
)
def test_what_the_library_runs_and_nobody_can_batch_is_refused_by_its_field(name: str, told: str) -> None:
    config, tensors = read_files(DIRECTORY / "refused" / name)
    with pytest.raises(UnsupportedAdapter) as refusal:
        check(config, tensors.header, golden_spec("llama"))
    assert refusal.value.field == told
    assert "not served" in refusal.value.message


@pytest.mark.parametrize("architecture", ["mtl_lora", "prompt_tuning", "reft", "of_tomorrow"])
def test_other_methods_are_refused(architecture: str) -> None:
    assert Spoilt("llama", "seq_bn").set(architecture=architecture).refusal().field == "architecture"


@pytest.mark.parametrize(
    ("base", "name", "fields", "told"),
    [
        ("llama", "seq_bn", {"residual_before_ln": "post_add"}, "residual_before_ln"),
        ("llama", "seq_bn", {"non_linearity": "mish"}, "non_linearity"),
        ("llama", "seq_bn", {"of_tomorrow": 1}, "of_tomorrow"),
        ("llama", "seq_bn", {"reduction_factor": 5e-324}, "reduction_factor"),
        ("llama", "compacter", {"reduction_factor": 0.01}, "reduction_factor"),
        ("qwen2", "seq_bn", {"original_ln_after": False}, "original_ln_after"),
        ("gemma2", "seq_bn", {"residual_before_ln": False}, "residual_before_ln"),
        ("gptj", "double_seq_bn", {"original_ln_before": True}, "original_ln_before"),
        ("gptj", "double_seq_bn", {"original_ln_after": False}, "original_ln_after"),
        ("gptj", "double_seq_bn", {"is_parallel": True}, "is_parallel"),
        ("phi", "double_seq_bn", {"is_parallel": True}, "is_parallel"),
        ("gemma2", "par_bn", {"is_parallel": False, "original_ln_before": True, "ln_before": True}, "ln_before"),
        ("llama", "lora", {"attn_matrices": ["q", "o"]}, "attn_matrices"),
    ],
)
def test_switches_without_a_form_are_refused(base: str, name: str, fields: dict[str, Any], told: str) -> None:
    assert Spoilt(base, name).set(**fields).refusal().field == told


def test_what_the_library_fails_on_in_gpt2_is_refused_even_with_all_its_tensors() -> None:
    dora = Spoilt("gpt2", "lora_qkv").set(use_dora=True)
    factors = [name for name in dora.tensors if name.endswith("lora_B")]
    for name in factors:
        dora.tensors[name.replace("lora_B", "m.weight")] = torch.ones(len(dora.tensors[name]), 1)
    assert dora.refusal().field == "use_dora"
    vera = Spoilt("gpt2", "vera").set(selfattn_lora=True).rename("mlp.c_proj", "attn.c_attn")
    assert vera.refusal().field == "vera_d"


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("seq_bn", {"scaling": "twice"}, "scaling"),
        ("seq_bn", {"scaling": float("nan")}, "scaling"),
        ("seq_bn", {"reduction_factor": 0}, "reduction_factor"),
        ("seq_bn", {"reduction_factor": {"0": 8}}, "reduction_factor"),
        ("seq_bn", {"leave_out": "all"}, "leave_out"),
        ("seq_bn", {"ln_before": "yes"}, "ln_before"),
        ("seq_bn", {"non_linearity": None}, "non_linearity"),
        ("compacter", {"phm_dim": 3}, "phm_dim"),
        ("ia3", {"r": 2}, "composition_mode"),
        ("lora", {"composition_mode": "multiply"}, "composition_mode"),
        ("lora", {"alpha": "8"}, "alpha"),
    ],
)
def test_fields_of_a_wrong_type_are_told(name: str, fields: dict[str, Any], told: str) -> None:
    assert Spoilt("llama", name).set(**fields).refusal(MalformedAdapter).field == told


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("seq_bn", {"reduction_factor": 4}),
        ("seq_bn", {"mh_adapter": True}),
        ("seq_bn", {"ln_after": True}),
        ("par_bn", {"scaling": "learned"}),
        ("per_layer", {"leave_out": []}),
        ("compacter", {"phm_rank": 2}),
        ("compacter", {"shared_phm_rule": False}),
        ("lora", {"r": 8}),
        ("lora", {"use_dora": True}),
        ("vera", {"vera_d": None, "vera_b": None}),
        ("prefix", {"flat": True}),
        ("prefix", {"prefix_length": 4}),
    ],
)
def test_a_config_that_needs_other_tensors_than_the_file_has_is_malformed(name: str, fields: dict[str, Any]) -> None:
    assert "save" in Spoilt("llama", name).set(**fields).refusal(MalformedAdapter).message


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("double_seq_bn", {"mh_adapter": False}),
        ("ln_after", {"ln_after": False}),
        ("scaled_par_bn", {"scaling": 1.0}),
        ("seq_bn", {"leave_out": [2]}),
        ("lora", {"attn_matrices": ["q"]}),
        ("lora", {"intermediate_lora": False}),
        ("dora", {"use_dora": False}),
    ],
)
def test_tensors_that_the_config_does_not_speak_of_are_refused_by_name(name: str, fields: dict[str, Any]) -> None:
    spoilt = Spoilt("llama", name).set(**fields)
    refusal = spoilt.refusal()
    assert refusal.tensor in spoilt.tensors
    assert refusal.tensor is not None
    assert refusal.tensor in refusal.message


def test_a_module_without_tensors_is_as_in_the_base_where_training_began_there() -> None:
    spoilt = Spoilt("llama", "lora")
    spoilt.tensors = {name: value for name, value in spoilt.tensors.items() if "layers.1." not in name}
    assert "left as in the base" in spoilt.check().warnings[-1]
    refusal = spoilt.set(init_weights="bert").refusal(MalformedAdapter)
    assert "model.layers.1.mlp.down_proj" in refusal.message


def test_the_name_in_the_tensors_must_be_the_config_s() -> None:
    spoilt = Spoilt("llama", "seq_bn")
    spoilt.config["name"] = "another"
    assert '"goldens"' in spoilt.refusal(MalformedAdapter).message
    spoilt.config["name"] = "a.b"
    assert spoilt.refusal(MalformedAdapter).field == "name"


def test_a_name_that_says_everything_is_no_trap() -> None:
    spoilt = Spoilt("llama", "union").rename(".goldens.", ".loras.")
    spoilt.config["name"] = "loras"
    assert spoilt.check().sites == Spoilt("llama", "union").check().sites


def test_unknown_tensors_and_no_tensors_are_refused() -> None:
    spoilt = Spoilt("llama", "seq_bn")
    spoilt.tensors["model.embed_tokens.weight"] = torch.zeros(1)
    assert spoilt.refusal().tensor == "model.embed_tokens.weight"
    spoilt.tensors = {}
    assert "none of them" in spoilt.refusal(MalformedAdapter).message


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 64), ("model_type", "mistral")])
def test_another_base_is_told(field: str, value: object) -> None:
    spoilt = Spoilt("llama", "seq_bn")
    spoilt.config[field] = value
    assert spoilt.refusal(BaseMismatch).field == field


def test_an_architecture_that_the_library_does_not_know_has_no_bottlenecks_but_low_rank_parts() -> None:
    spec = replace(golden_spec("llama"), model_type="of_tomorrow")
    for name in ("seq_bn", "prefix"):
        spoilt = Spoilt("llama", name)
        spoilt.config["model_type"] = "of_tomorrow"
        assert spoilt.refusal(spec=spec).field == "architecture"
    lora = Spoilt("llama", "lora")
    lora.config["model_type"] = "of_tomorrow"
    assert len(lora.check(spec).sites) == 15


def test_a_base_with_other_sizes_is_told() -> None:
    spoilt = Spoilt("llama", "lora")
    name = "model.layers.0.self_attn.q_proj.loras.goldens.lora_A"
    spoilt.tensors[name] = torch.zeros(4, 48)
    assert spoilt.refusal(BaseMismatch).tensor == name


def test_copies_that_differ_are_refused() -> None:
    for base, name, part in (("llama", "prefix", "model.prefix_tuning"), ("llama", "ln_before", "norm_before")):
        spoilt = Spoilt(base, name)
        tensor = next(key for key in spoilt.tensors if part in key)
        spoilt.tensors[tensor] = spoilt.tensors[tensor] + 1
        spoilt.check()
        with pytest.raises(MalformedAdapter):
            spoilt.decode()


@pytest.mark.parametrize(("base", "name"), [case for case in CASES if case[0] == "llama"])
def test_a_value_that_is_no_number_is_found_in_every_tensor(base: str, name: str) -> None:
    healthy = Spoilt(base, name).tensors
    for tensor in healthy:
        spoilt = Spoilt(base, name)
        spoilt.tensors[tensor] = spoilt.tensors[tensor].clone()
        spoilt.tensors[tensor].view(-1)[0] = float("inf")
        with pytest.raises(MalformedAdapter):
            spoilt.decode()


@pytest.mark.parametrize(("base", "name"), CASES)
def test_every_tensor_counts(base: str, name: str) -> None:
    """Without any one of its tensors an adapter is another, refused or told of; copies may be missing."""
    healthy = Spoilt(base, name)
    report = healthy.check()
    for tensor in healthy.tensors:
        if tensor in report.irrelevant_tensors or "prefix_tunings" in tensor:
            continue
        spoilt = Spoilt(base, name)
        del spoilt.tensors[tensor]
        try:
            told = spoilt.check()
        except AdapterError:
            continue
        assert len(told.warnings) > len(report.warnings), tensor


@pytest.mark.parametrize("spoil", [[], "x", 3, {"config": 3}, {"config": {}}, {"config": {"architecture": "union"}}])
def test_nonsense_for_a_config_is_malformed(spoil: Any) -> None:
    spoilt = Spoilt("llama", "seq_bn")
    spoilt.config = spoilt.config | (spoil if isinstance(spoil, dict) else {"config": spoil})
    spoilt.refusal(AdapterError)


def test_a_union_of_the_same_place_twice_is_refused() -> None:
    spoilt = Spoilt("llama", "seq_bn")
    part = spoilt.config["config"]
    spoilt.config["config"] = {"architecture": "union", "configs": [part, part]}
    spoilt.refusal(MalformedAdapter)


def _spoil_type(value: Any) -> list[Any]:
    others: tuple[Any, ...] = (None, "x", -1, 1e400, [], {}, [[]], True, {"a": 1})
    return [other for other in others if other != value]


@pytest.mark.parametrize("name", ["seq_bn", "compacter", "lora", "vera", "prefix", "mam"])
def test_no_value_of_any_field_escapes_the_refusals(name: str) -> None:
    """Whatever a field holds, the answer is a report or an AdapterError."""
    fields: Callable[[Spoilt], list[dict[str, Any]]] = lambda one: [  # noqa: E731
        one.config,
        one.config["config"],
        *one.config["config"].get("configs", []),
    ]
    for number in range(len(fields(Spoilt("llama", name)))):
        for field, value in list(fields(Spoilt("llama", name))[number].items()):
            for other in _spoil_type(value):
                spoilt = Spoilt("llama", name)
                fields(spoilt)[number][field] = other
                with contextlib.suppress(AdapterError):
                    json.dumps(spoilt.check().to_json())
