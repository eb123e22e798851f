"""Every variant of LoRA equals PEFT on a plain model; and each part of what is decoded matters."""

from __future__ import annotations

import copy
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from peft_core.errors import AdapterError, BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.forms import AdapterForms, SiteChange
from tests.peft_core.adapter_files import load_adapter, write_adapter
from tests.peft_core.lora_samples import (
    assert_equals_peft,
    decoded,
    error_against_peft,
    spec_of,
    tiny_base,
)
from tests.tiny_models import all_targets, attention_targets, make_lora

FIVE = ("llama", "qwen2", "gpt2", "gemma3", "phi3")


@pytest.mark.parametrize("arch", FIVE)
def test_dora_equals_peft(arch: str, tmp_path: Path) -> None:
    """Conv1D and biases (gpt2), biases of some (qwen2), fused projections (phi3)."""
    model = tiny_base(arch)
    forms, report = assert_equals_peft(
        model, make_lora(model, tmp_path, targets=all_targets(arch), use_dora=True, alpha=12), tolerance=1e-4
    )
    assert "gain" in report.forms
    assert report.needs_base
    without_shift = {path: replace(change, shift=None) for path, change in forms.changes.items()}
    if arch in ("gpt2", "qwen2"):
        assert error_against_peft(model, tmp_path, replace(forms, changes=without_shift)) > 1e-3


def test_dora_norms_include_the_scaling(tmp_path: Path) -> None:
    model = tiny_base("llama")
    directory = make_lora(model, tmp_path / "a", targets=["q_proj"], use_dora=True, use_rslora=True, alpha=3)
    assert_equals_peft(model, directory)


def test_dora_without_the_base_is_refused(tmp_path: Path) -> None:
    model = tiny_base("llama")
    directory = make_lora(model, tmp_path, targets=["q_proj"], use_dora=True)
    with pytest.raises(UnsupportedAdapter, match="DoRA is decoded with the base's weights"):
        decoded(model, directory, with_base=False)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_magnitudes_are_read_in_both_spellings(arch: str, spelling: str, tmp_path: Path) -> None:
    model = tiny_base(arch)
    saved = make_lora(model, tmp_path / "saved", targets=attention_targets(arch), use_dora=True)
    config, tensors = load_adapter(saved)
    end = ".weight" if spelling == "new" else ".default.weight"
    named = {name + end if name.endswith("magnitude_vector") else name: value for name, value in tensors.items()}
    assert any(name.endswith(end) and "magnitude" in name for name in named)
    renamed = write_adapter(tmp_path / "renamed", config, named)
    for path, delta in decoded(model, saved).forms.linear.items():
        assert torch.equal(delta.up, decoded(model, renamed).forms.linear[path].up)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"init_lora_weights": "pissa"}),
        ("qwen2", {"init_lora_weights": "pissa", "use_rslora": True}),
        ("gpt2", {"init_lora_weights": "pissa"}),
        ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
        ("llama", {"init_lora_weights": "olora"}),
        ("gpt2 square", {"init_lora_weights": "olora"}),  # PEFT itself fails on other Conv1D
        ("phi3", {"init_lora_weights": "olora", "rank_pattern": {"qkv_proj": 6}}),
        ("llama", {"kasa_config": KasaConfig()}),
        ("gemma3", {"kasa_config": KasaConfig()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_initialisations_that_change_the_base_become_further_ranks(
    arch: str, options: dict[str, Any], tmp_path: Path
) -> None:
    name, _, is_square = arch.partition(" ")
    model, targets = tiny_base(name), ["attn.c_proj"] if is_square else attention_targets(name)
    directory = make_lora(model, tmp_path, targets=targets, alpha=8, **options)
    forms, report = assert_equals_peft(model, directory, tolerance=1e-4)
    assert report.ranks == ((8, 12) if "rank_pattern" in options else (8,))
    assert report.needs_base
    plain = {path: replace(d, down=d.down[:4], up=d.up[:, :4]) for path, d in forms.linear.items()}
    assert error_against_peft(model, directory, replace(forms, linear=plain)) > 0.05


def test_a_second_load_changes_nothing(tmp_path: Path) -> None:
    """PEFT takes the components out of the base once more; here the base is never touched."""
    model = tiny_base("llama")
    directory = make_lora(model, tmp_path, targets=["q_proj"], init_lora_weights="pissa")
    first, second = decoded(model, directory).forms, decoded(model, directory).forms
    assert all(torch.equal(first.linear[path].up, second.linear[path].up) for path in first.linear)
    assert_equals_peft(model, directory, tolerance=1e-4)


def test_a_converted_pissa_is_plain(tmp_path: Path) -> None:
    """r and alpha doubled, and init_lora_weights true: nothing is taken out of the base."""
    model = tiny_base("llama")
    _, report = assert_equals_peft(model, make_lora(model, tmp_path, targets=["q_proj"], rank=8, alpha=16))
    assert report.ranks == (8,)
    assert not report.needs_base


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_bias_on_the_up_projection_is_scaled(arch: str, use_rslora: bool, tmp_path: Path) -> None:
    model = tiny_base(arch)
    directory = make_lora(model, tmp_path, targets=all_targets(arch), lora_bias=True, use_rslora=use_rslora, alpha=12)
    forms, report = assert_equals_peft(model, directory)
    assert "shift" in report.forms
    assert not report.needs_base
    scaling = report.sites[0].scaling
    unscaled = {
        path: SiteChange(shift=change.shift / scaling)
        for path, change in forms.changes.items()
        if change.shift is not None
    }
    assert error_against_peft(model, directory, replace(forms, changes=unscaled)) > 1e-3


@pytest.mark.parametrize(
    "blocks",
    [
        {"target_modules_bd_a": ["q_proj", "v_proj"], "target_modules_bd_b": ["o_proj"], "nblocks": 2},
        {"target_modules_bd_a": ["proj"], "nblocks": 4},
        {"target_modules_bd_b": ["layers.1"], "nblocks": 2, "match_strict": False},
    ],
    ids=["each side", "all", "one layer"],
)
def test_block_diagonal_factors_equal_peft(blocks: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_base("llama")
    targets = ["q_proj", "v_proj", "o_proj"]
    directory = make_lora(model, tmp_path, targets=targets, use_bdlora=BdLoraConfig(**blocks))
    assert_equals_peft(model, directory)


def test_blocks_matter(tmp_path: Path) -> None:
    model = tiny_base("llama")
    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)
    directory = make_lora(model, tmp_path / "a", targets=["q_proj"], use_bdlora=blocks)
    config, tensors = load_adapter(directory)
    config["use_bdlora"] = {**config["use_bdlora"], "target_modules_bd_a": None, "target_modules_bd_b": ["q_proj"]}
    with pytest.raises(AdapterError):
        decoded(model, write_adapter(tmp_path / "b", config, tensors))
    config["use_bdlora"] = {"nblocks": 3, "target_modules_bd_a": ["q_proj"]}
    with pytest.raises(MalformedAdapter, match=r"use_bdlora.*3 equal parts"):
        decoded(model, write_adapter(tmp_path / "c", config, tensors))


def test_pooled_inputs_become_repeated_columns(tmp_path: Path) -> None:
    """PEFT has QALoRA on GPTQ bases only, so its definition stands here: the mean of each group, times their number."""
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"], alpha=8))
    pooled = {name: v[:, :8].contiguous() if ".lora_A." in name else v for name, v in tensors.items()}
    directory = write_adapter(tmp_path / "b", {**config, "use_qalora": True, "qalora_group_size": 8}, pooled)
    forms = decoded(model, directory).forms
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    path = "model.layers.0.self_attn.q_proj"
    name = f"base_model.model.{path}"
    shrunk = x.view(5, 8, 8).mean(dim=2) * 8
    expected = shrunk @ pooled[f"{name}.lora_A.weight"].T @ pooled[f"{name}.lora_B.weight"].T * 2
    delta = forms.linear[path]
    assert torch.allclose(x @ delta.down.T @ delta.up.T, expected, atol=1e-5)
    for size in (16, 7):
        other = {**config, "use_qalora": True, "qalora_group_size": size}
        with pytest.raises(AdapterError):
            decoded(model, write_adapter(tmp_path / str(size), other, pooled))


@pytest.mark.parametrize("extra", ["velora_config", "monteclora_config"])
def test_what_only_trains_is_set_aside(extra: str, tmp_path: Path) -> None:
    model = tiny_base("llama")
    value: Any = VeloraConfig() if extra == "velora_config" else MontecloraConfig()
    directory = make_lora(model, tmp_path, targets=["q_proj", "v_proj"], **{extra: value})
    _, report = assert_equals_peft(model, directory)
    assert report.irrelevant_tensors


def test_an_activated_lora_carries_its_invocation(tmp_path: Path) -> None:
    model = tiny_base("llama")
    directory = make_lora(model, tmp_path / "a", targets=["q_proj"], alora_invocation_tokens=[7, 9])
    assert decoded(model, directory).forms.invocation_tokens == (7, 9)
    config, tensors = load_adapter(directory)
    switched_off: list[Any] = [None, [], False]
    for off in switched_off:
        plain = write_adapter(tmp_path / str(off), {**config, "alora_invocation_tokens": off}, tensors)
        assert decoded(model, plain).forms.invocation_tokens == ()
    far = write_adapter(tmp_path / "far", {**config, "alora_invocation_tokens": [7, 256]}, tensors)
    with pytest.raises(BaseMismatch, match=r"alora_invocation_tokens.*256 tokens"):
        decoded(model, far)
    tensors["base_model.model.model.norm.weight"] = torch.ones(64)
    with pytest.raises(UnsupportedAdapter, match="before the invocation"):
        decoded(model, write_adapter(tmp_path / "norm", config, tensors))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True, "lora_bias": True},
        {"use_dora": True, "use_qalora": True},
        {"use_bdlora": {"nblocks": 2}, "alora_invocation_tokens": [3]},
        {"kasa_config": {}, "init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [3], "init_lora_weights": "olora"},
        {"lora_bias": True, "init_lora_weights": "pissa"},
    ],
    ids=lambda fields: " and ".join(fields),
)
def test_variants_that_peft_cannot_combine_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"]))
    with pytest.raises(UnsupportedAdapter, match="together with") as refusal:
        decoded(model, write_adapter(tmp_path / "b", {**config, **fields}, tensors))
    assert refusal.value.field in fields


@pytest.mark.parametrize(
    ("start", "remedy"),
    [
        ("pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("lora_ga", "path_initial_model_for_weight_conversion"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("loftq", "Save the base that it made"),
    ],
)
def test_a_base_that_cannot_be_recovered_is_refused_with_a_remedy(start: str, remedy: str, tmp_path: Path) -> None:
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"]))
    with pytest.raises(UnsupportedAdapter, match=remedy):
        decoded(model, write_adapter(tmp_path / "b", {**config, "init_lora_weights": start}, tensors))


@pytest.mark.parametrize(
    ("suffix", "shape", "field"),
    [("lora_magnitude_vector", 64, "use_dora"), ("lora_B.bias", 64, "lora_bias"), ("lora_diag", 4, "kasa_config")],
)
def test_a_part_and_its_field_go_together(suffix: str, shape: int, field: str, tmp_path: Path) -> None:
    """PEFT drops the one without the other in silence."""
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"]))
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{suffix}"
    with pytest.raises(UnsupportedAdapter, match=f'field "{field}" is off'):
        decoded(model, write_adapter(tmp_path / "b", config, {**tensors, name: torch.ones(shape)}))
    on: Any = {} if field == "kasa_config" else True
    with pytest.raises(MalformedAdapter, match=f'field "{field}" is on'):
        decoded(model, write_adapter(tmp_path / "c", {**config, field: on}, tensors))
    with pytest.raises(BaseMismatch, match=suffix):
        decoded(model, write_adapter(tmp_path / "d", {**config, field: on}, {**tensors, name: torch.ones(shape + 1)}))


def test_magnitudes_on_a_zero_row_are_malformed(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_base("llama"))
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight")[3] = 0
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"], use_dora=True))
    tensors = {name: v * 0 if ".lora_B." in name else v for name, v in tensors.items()}
    with pytest.raises(MalformedAdapter, match=r"lora_magnitude_vector.*not a number"):
        decoded(model, write_adapter(tmp_path / "b", config, tensors))


def test_names_that_keep_default_are_read_at_every_part(tmp_path: Path) -> None:
    model = tiny_base("llama")
    options: dict[str, Any] = {"use_dora": True, "modules_to_save": ["model.norm"]}
    saved = make_lora(model, tmp_path / "a", targets=["q_proj", "embed_tokens", "lm_head"], **options)
    config, tensors = load_adapter(saved)

    def renamed(name: str) -> str:
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
            name = re.sub(rf"\.{part}(?=\.|$)", f".{part}.default", name)
        return name

    named = {renamed(name): value for name, value in tensors.items()}
    assert sum("default" in name for name in named) == 5 * 3
    assert_same(decoded(model, saved).forms, decoded(model, write_adapter(tmp_path / "b", config, named)).forms)


def assert_same(first: AdapterForms, second: AdapterForms) -> None:
    for part in ("linear", "changes", "embeddings", "norms"):
        one, other = getattr(first, part), getattr(second, part)
        assert one.keys() == other.keys()
        for path in one:
            values = [(getattr(one[path], f.name), getattr(other[path], f.name)) for f in fields(one[path])]
            assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in values)


def test_adapters_that_kept_their_own_name_are_told(tmp_path: Path) -> None:
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"]))
    named = {name.replace(".weight", ".sql.weight"): value for name, value in tensors.items()}
    with pytest.raises(MalformedAdapter, match=r"own name.*save_pretrained"):
        decoded(model, write_adapter(tmp_path / "b", config, named))


def test_spec_of_the_tied_bases_is_tied() -> None:
    assert spec_of(tiny_base("qwen2", tied=True)).tie_word_embeddings
    assert not spec_of(tiny_base("qwen2", tied=False)).tie_word_embeddings
