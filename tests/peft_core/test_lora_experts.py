"""LoRA on experts and routers against HF PEFT, in a running engine; both spellings, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_core.errors import AdapterError, BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods import DecodeReport, check, decode
from tests.peft_core.adapter_files import LoadedTensors, load_adapter, logits_of, write_adapter
from tests.peft_core.test_experts import changed_model, mixture, mixture_spec
from tests.tiny_engine import Ask, TinyEngine, assert_equals_oracle
from tests.tiny_models import HIDDEN, load_oracle, make_lora, random_prompt

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
TARGETS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "gate-up": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "down": {"target_parameters": ["experts.down_proj"], "use_rslora": True},
    "patterns": {
        "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
        "rank_pattern": {"gate_up_proj": 6, ".*layers\\.1\\..*down_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
}
OLD_NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), 128),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 64),
}


def saved(arch: str, directory: Path, name: str, *, seed: int = 1) -> Path:
    return make_lora(mixture(arch), directory / name, rank=3, targets=["q_proj"], seed=seed, **TARGETS[name])


@pytest.mark.parametrize("arch", MIXTURES)
def test_a_batch_of_adapters_on_experts_equals_peft(arch: str, tmp_path: Path) -> None:
    paths = {name: saved(arch, tmp_path, name, seed=seed) for seed, name in enumerate(TARGETS)}
    paths["linear"] = make_lora(mixture(arch), tmp_path / "linear", targets="all-linear")  # all but qwen2_moe's experts
    engine = TinyEngine(mixture(arch), tmp_path, chunk_size=16)
    tickets = {name: engine.add(name, path) for name, path in paths.items()}
    asks = [
        Ask(f"{name}-{length}", random_prompt(length, seed=length), ticket)
        for name, ticket in tickets.items()
        for length in (3, 21)
    ]
    asks.append(Ask("base-21", random_prompt(21, seed=21)))
    answers = engine.run(asks, stagger_steps=1)
    for name, path in paths.items():
        oracle = load_oracle(mixture(arch), path)
        for length in (3, 21):
            ask = next(ask for ask in asks if ask.name == f"{name}-{length}")
            assert_equals_oracle(ask, answers[ask.name], oracle)
    assert_equals_oracle(asks[-1], answers["base-21"], mixture(arch))


def decoded_logits(arch: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the base with what was decoded in its weights."""
    forms = decode(config, LoadedTensors(tensors), mixture_spec(arch)).forms
    model: Any = changed_model(arch, forms)
    with torch.no_grad():
        for path, delta in forms.linear.items():
            model.get_submodule(path).weight += delta.up @ delta.down
    return logits_of(model, random_prompt(17))


@pytest.mark.parametrize("arch", MIXTURES)
def test_the_order_of_experts_and_ranks_differs_between_the_factors(arch: str, tmp_path: Path) -> None:
    """Negative control: either factor in the other's order is another adapter."""
    path = saved(arch, tmp_path, "both")
    config, tensors = load_adapter(path)
    expected = logits_of(load_oracle(mixture(arch), path), random_prompt(17))
    assert (decoded_logits(arch, config, tensors) - expected).abs().max() <= 1e-4
    for side in ("lora_A", "lora_B"):
        spoilt = {name: _reordered(name, value) if side in name else value for name, value in tensors.items()}
        assert (decoded_logits(arch, config, spoilt) - expected).abs().max() > 0.1


def _reordered(name: str, value: torch.Tensor) -> torch.Tensor:
    if ".experts." not in name:
        return value
    if "lora_A" in name:
        return value.view(-1, 4, value.shape[1]).transpose(0, 1).reshape(value.shape)
    return value.view(value.shape[0], 4, -1).transpose(1, 2).reshape(value.shape)


def test_the_report_tells_experts_and_routers(tmp_path: Path) -> None:
    config, tensors = load_adapter(saved("mixtral", tmp_path, "patterns"))
    report = check(config, LoadedTensors(tensors).header, mixture_spec("mixtral"))
    ranks = {site.path: site.rank for site in report.sites}
    assert ranks["model.layers.0.mlp.experts.gate_up_proj"] == 6
    assert ranks["model.layers.1.mlp.experts.down_proj"] == 2
    assert ranks["model.layers.2.mlp.gate.weight"] == 3
    assert set(report.forms) == {"experts", "low rank"}
    assert report.num_parameters == sum(value.numel() for value in tensors.values())
    assert report.warnings == ()


def old_adapter(
    arch: str, directory: Path, *, rank: int = 3, router: bool = False, **fields: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """As transformers 4 and PEFT wrote it: one module a matrix of an expert."""
    block, (gate, up, down), width = OLD_NAMES[arch]
    random = torch.Generator().manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}

    def add(path: str, inputs: int, outputs: int) -> None:
        prefix = f"base_model.model.model.layers.{path}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=random) / inputs**0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=random) * 0.2

    for layer in range(3):
        add(f"{layer}.self_attn.q_proj", HIDDEN, HIDDEN)
        if router:
            add(f"{layer}.{block}.gate", HIDDEN, 4)
        for expert in range(4):
            add(f"{layer}.{block}.experts.{expert}.{gate}", HIDDEN, width)
            add(f"{layer}.{block}.experts.{expert}.{up}", HIDDEN, width)
            add(f"{layer}.{block}.experts.{expert}.{down}", width, HIDDEN)
    targets = ["q_proj", gate, up, down, *(["gate"] if router else [])]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": targets}
    config |= fields
    write_adapter(directory, config, tensors)
    return config, tensors


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("arch", OLD_NAMES)
def test_factors_of_single_experts_equal_peft_s_conversion(arch: str, router: bool, tmp_path: Path) -> None:
    config, tensors = old_adapter(arch, tmp_path, router=router)
    expected = logits_of(load_oracle(mixture(arch), tmp_path), random_prompt(17))
    assert (decoded_logits(arch, config, tensors) - expected).abs().max() <= 1e-4
    assert (logits_of(mixture(arch), random_prompt(17)) - expected).abs().max() > 0.1
    halves = {_swapped(name, arch): value for name, value in tensors.items()}  # negative control
    assert (decoded_logits(arch, config, halves) - expected).abs().max() > 0.1


def _swapped(name: str, arch: str) -> str:
    """The gate projection's tensor under the up projection's name, and the other way round."""
    gate, up = (f".{part}." for part in OLD_NAMES[arch][1][:2])
    return name.replace(gate, "#").replace(up, gate).replace("#", up)


def test_they_keep_the_scaling_that_they_were_trained_with(tmp_path: Path) -> None:
    """PEFT's conversion makes gate and up projections stronger by the root of 2 where ranks are stabilised."""
    config, tensors = old_adapter("mixtral", tmp_path, use_rslora=True)
    report = check(config, LoadedTensors(tensors).header, mixture_spec("mixtral"))
    assert "1.41 times" in report.warnings[0]
    assert report.sites[-1].scaling == pytest.approx(8 / 3**0.5)
    plain = config | {"use_rslora": False, "lora_alpha": 8 * 3**0.5}  # the same numbers said without stabilisation
    got = decoded_logits("mixtral", config, tensors)
    assert (got - decoded_logits("mixtral", plain, tensors)).abs().max() <= 1e-4
    write_adapter(tmp_path / "plain", plain, tensors)
    assert (got - logits_of(load_oracle(mixture("mixtral"), tmp_path / "plain"), random_prompt(17))).abs().max() <= 1e-4
    peft = logits_of(load_oracle(mixture("mixtral"), tmp_path), random_prompt(17))
    assert (got - peft).abs().max() > 0.05


def test_ranks_may_differ_between_single_experts(tmp_path: Path) -> None:
    config, tensors = old_adapter("mixtral", tmp_path, rank_pattern={"experts.1.w1": 2})
    for name in list(tensors):
        if ".experts.1.w1." in name:
            tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
        elif ".experts.2.w3." in name:
            del tensors[name]
    forms = decode(config, LoadedTensors(tensors), mixture_spec("mixtral")).forms
    delta = forms.experts["model.layers.0.mlp.experts.gate_up_proj"]
    assert delta.down.shape == (4, 6, HIDDEN)
    product = delta.up @ delta.down
    prefix = "base_model.model.model.layers.0.block_sparse_moe.experts"
    up, down = tensors[f"{prefix}.1.w1.lora_B.weight"], tensors[f"{prefix}.1.w1.lora_A.weight"]
    assert torch.allclose(product[1, :128], 4 * up @ down, atol=1e-5)
    assert not product[2, 128:].any()


def refusal(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], arch: str = "mixtral", **fields: Any
) -> AdapterError:
    with pytest.raises(AdapterError) as error:
        check(config | fields, LoadedTensors(tensors).header, mixture_spec(arch))
    return error.value


def report_of(config: dict[str, Any], tensors: dict[str, torch.Tensor], **fields: Any) -> DecodeReport:
    return check(config | fields, LoadedTensors(tensors).header, mixture_spec("mixtral"))


def test_factors_that_the_config_does_not_target_are_refused(tmp_path: Path) -> None:
    config, tensors = load_adapter(saved("mixtral", tmp_path, "both"))
    for parameters in (None, [], ["experts.down_proj"]):
        error = refusal(config, tensors, target_parameters=parameters)
        assert isinstance(error, UnsupportedAdapter | BaseMismatch)
        assert error.tensor is not None
        assert "experts" in error.tensor
    old_config, old = old_adapter("mixtral", tmp_path / "old")
    error = refusal(old_config, old, target_modules=["q_proj", "w1", "w2"])
    assert ".w3." in str(error)
    assert report_of(old_config, old, target_modules="all-linear").sites


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"target_parameters": ["experts.up_proj"]}, "target_parameters"),
        ({"target_parameters": 3}, "target_parameters"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_fields_that_experts_have_no_meaning_for_are_refused(
    fields: dict[str, Any], field: str, tmp_path: Path
) -> None:
    config, tensors = load_adapter(saved("mixtral", tmp_path, "both"))
    assert refusal(config, tensors, **fields).field == field


def test_experts_named_as_a_module_are_refused_with_the_field_that_names_them(tmp_path: Path) -> None:
    config, tensors = load_adapter(saved("mixtral", tmp_path, "both"))
    error = refusal(config, tensors, target_modules=["q_proj", "experts"])
    assert error.field == "target_modules"
    assert "target_parameters" in str(error)


def test_sizes_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    config, tensors = load_adapter(saved("mixtral", tmp_path, "both"))
    name = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    for spoilt in (tensors[name][:-1], tensors[name][:, :-1]):
        error = refusal(config, tensors | {name: spoilt})
        assert isinstance(error, BaseMismatch)
        assert error.tensor == name
    assert isinstance(refusal(config, tensors, r=5), MalformedAdapter)
    bias = name.replace("lora_A.weight", "lora_B.bias")
    assert refusal(config, tensors | {bias: torch.zeros(HIDDEN)}).tensor == bias
    alone = {other: value for other, value in tensors.items() if other != name}
    assert "lora_A.weight" in str(refusal(config, alone))


def test_an_expert_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    config, tensors = old_adapter("mixtral", tmp_path)
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.4.w1.lora_A.weight"
    error = refusal(config, tensors | {name: torch.zeros(3, HIDDEN), name.replace("_A", "_B"): torch.zeros(128, 3)})
    assert "experts.4" in str(error)


def test_both_spellings_of_one_weight_are_refused(tmp_path: Path) -> None:
    config, tensors = load_adapter(saved("mixtral", tmp_path, "both"))
    old_config, old = old_adapter("mixtral", tmp_path / "old")
    targets = [*config["target_modules"], *old_config["target_modules"]]
    assert isinstance(refusal(config, tensors | old, target_modules=targets), MalformedAdapter)


def test_targeted_experts_without_tensors_stay_as_in_the_base(tmp_path: Path) -> None:
    config, tensors = load_adapter(saved("mixtral", tmp_path, "both"))
    rest = {name: value for name, value in tensors.items() if ".layers.2.mlp." not in name}
    (warning,) = report_of(config, rest).warnings
    assert "model.layers.2.mlp.experts.gate_up_proj" in warning
    assert refusal(config, rest, init_lora_weights=False).field == "init_lora_weights"


def test_a_linear_may_be_targeted_by_its_weight(tmp_path: Path) -> None:
    path = make_lora(mixture("mixtral"), tmp_path / "a", targets=[], target_parameters=["q_proj.weight"])
    config, tensors = load_adapter(path)
    report = report_of(config, tensors)
    assert [site.path for site in report.sites] == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    expected = logits_of(load_oracle(mixture("mixtral"), path), random_prompt(17))
    assert (decoded_logits("mixtral", config, tensors) - expected).abs().max() <= 1e-4


def test_the_adapter_s_name_in_a_tensor_s_name_is_read(tmp_path: Path) -> None:
    path = saved("mixtral", tmp_path, "both")
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(str(path / "adapter_model.safetensors"))
    named = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    assert report_of(config, named).sites == report_of(config, tensors).sites
