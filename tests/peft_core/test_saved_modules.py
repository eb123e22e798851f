"""Whatever a LoRA adapter replaces in the base, replaced as PEFT does: biases, modules, tables, tied or not."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_core.errors import AdapterError, BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.forms import AdapterForms, NormWeights, SiteChange
from tests.peft_core.adapter_files import load_adapter, logits_of, write_adapter
from tests.peft_core.lora_samples import (
    PROMPT,
    assert_equals_peft,
    decoded,
    error_against_peft,
    given,
    logits_with,
    resized_adapter,
    spec_of,
    tables_of,
    tiny_base,
)
from tests.plain_forms import applied
from tests.tiny_models import all_targets, attention_targets, load_oracle, make_lora

PREFIX = "base_model.model."


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("arch", ["qwen2", "gpt2", "opt"])
def test_replaced_biases_become_differences(arch: str, bias: str, tmp_path: Path) -> None:
    """gpt2 and opt: the biases of norms, too, are among all."""
    model = tiny_base(arch)
    directory = make_lora(model, tmp_path, targets=attention_targets(arch), bias=bias)
    forms, report = assert_equals_peft(model, directory)
    assert report.needs_base
    assert bool(forms.norms) == (bias == "all" and arch != "qwen2")
    with pytest.raises(UnsupportedAdapter, match=r"replaced bias.*the base's weights"):
        decoded(model, directory, with_base=False)
    path = next(
        path for path in reversed(list(forms.changes)) if "k_proj" not in path
    )  # attention ignores a key's bias
    change = forms.changes[path]
    bias_vector = model.get_submodule(path).bias.detach()
    absolute = {**forms.changes, path: SiteChange(shift=given(change.shift) + bias_vector)}
    assert error_against_peft(model, directory, replace(forms, changes=absolute)) > 1e-3


@pytest.mark.parametrize("arch", ["qwen2", "gpt2"])
def test_dora_and_a_replaced_bias_add_up(arch: str, tmp_path: Path) -> None:
    model = tiny_base(arch)
    targets = attention_targets(arch)
    assert_equals_peft(model, make_lora(model, tmp_path, targets=targets, bias="all", use_dora=True), tolerance=1e-4)


def test_a_bias_that_the_base_lacks_is_a_mismatch(tmp_path: Path) -> None:
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"]))
    tensors[f"{PREFIX}model.layers.0.self_attn.k_proj.bias"] = torch.ones(32)
    with pytest.raises(BaseMismatch, match="of this base has none"):
        decoded(model, write_adapter(tmp_path / "b", config, tensors))


def test_biases_that_the_config_claims_and_the_file_lacks_are_told(tmp_path: Path) -> None:
    model = tiny_base("llama")
    _, report = decoded(model, make_lora(model, tmp_path, targets=["q_proj"], bias="all"))
    assert any('bias="all"' in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("arch", "names", "num_norms"),
    [
        ("llama", ["norm"], 7),  # PEFT compares letters: input_layernorm and post_attention_layernorm too
        ("llama", ["model.norm"], 1),
        ("gpt2", ["ln_f"], 1),
        ("gemma3", ["norm"], 19),
        ("qwen3", ["q_norm", "k_norm"], 6),
    ],
)
def test_saved_norms_equal_peft(arch: str, names: list[str], num_norms: int, tmp_path: Path) -> None:
    model = tiny_base(arch)
    directory = make_lora(model, tmp_path, targets=attention_targets(arch), modules_to_save=names)
    forms, report = assert_equals_peft(model, directory)
    assert len(forms.norms) == num_norms
    assert "norm" in report.forms
    doubled = {path: NormWeights(given(norm.weight) * 1.1, norm.bias) for path, norm in forms.norms.items()}
    assert error_against_peft(model, directory, replace(forms, norms=doubled)) > 1e-3


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "qwen2"])
def test_a_saved_container_replaces_every_linear_inside(arch: str, tmp_path: Path) -> None:
    """Conv1D is turned back, biases become differences; targets inside are left out, as PEFT does."""
    model = tiny_base(arch)
    directory = make_lora(model, tmp_path, targets=all_targets(arch), modules_to_save=["mlp"])
    forms, report = assert_equals_peft(model, directory)
    replaced = [path for path, change in forms.changes.items() if change.replacement is not None]
    assert replaced
    assert all(".mlp." in path for path in replaced)
    assert not any(".mlp." in site.path for site in report.sites)
    turned = {
        path: replace(change, replacement=given(change.replacement).flip(0)) if path in replaced else change
        for path, change in forms.changes.items()
    }
    assert error_against_peft(model, directory, replace(forms, changes=turned)) > 1e-2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["embedding", "head", "both"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_saved_tables_equal_peft(arch: str, which: tuple[int, ...], tied: bool, tmp_path: Path) -> None:
    """Where both are one weight, a saved module still replaces itself alone."""
    model = tiny_base(arch, tie_word_embeddings=tied)
    names = [tables_of(arch)[index] for index in which]
    directory = make_lora(model, tmp_path, targets=attention_targets(arch), modules_to_save=names)
    forms, _ = assert_equals_peft(model, directory)
    assert (tables_of(arch)[0] in forms.embeddings) == (0 in which)
    assert (tables_of(arch)[1] in forms.changes) == (1 in which)


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"]])
def test_saved_tables_that_are_tied_on_purpose_equal_peft(names: list[str], tmp_path: Path) -> None:
    model = tiny_base("qwen2", tied=True)
    directory = make_lora(model, tmp_path / "a", targets=["q_proj"], modules_to_save=names, ensure_weight_tying=True)
    forms, _ = assert_equals_peft(model, directory)
    assert "model.embed_tokens" in forms.embeddings
    assert "lm_head" in forms.changes
    config, tensors = load_adapter(directory)
    del tensors[f"{PREFIX}lm_head.weight"]
    lean = decoded(model, write_adapter(tmp_path / "lean", config, tensors)).forms
    assert error_against_peft(model, directory, lean) < 2e-5
    alone = write_adapter(tmp_path / "alone", config | {"ensure_weight_tying": False}, tensors)
    assert error_against_peft(model, directory, decoded(model, alone).forms) > 0.05


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gemma3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["embedding", "head", "both"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
def test_adapted_tables_equal_peft(
    arch: str, tied: bool, which: tuple[int, ...], use_dora: bool, tmp_path: Path
) -> None:
    """PEFT stores the tables beside the factors; equal to the base's, they are dropped."""
    model = tiny_base(arch, tie_word_embeddings=tied)
    targets = [tables_of(arch)[index].rpartition(".")[2] for index in which]
    directory = make_lora(model, tmp_path, targets=targets, use_dora=use_dora)
    if arch != "gpt2":  # PEFT does not know its table by name
        assert any("base_layer.weight" in name for name in load_adapter(directory)[1])
    forms, report = assert_equals_peft(model, directory, tolerance=1e-4 if use_dora else 2e-5)
    assert all(change.replacement is None for change in forms.changes.values())
    assert all(change.replacement is None for change in forms.embeddings.values())
    assert report.forms == (("embedding",) if which == (0,) else report.forms)
    if which == (0,):
        assert not forms.linear
        other_scale = {path: replace(e, up=given(e.up) * 1.05) for path, e in forms.embeddings.items()}
        assert error_against_peft(model, directory, replace(forms, embeddings=other_scale)) > 1e-3


def test_adapted_tables_that_are_tied_on_purpose_equal_peft(tmp_path: Path) -> None:
    model = tiny_base("qwen2", tied=True)
    directory = make_lora(model, tmp_path / "a", targets=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    forms, _ = assert_equals_peft(model, directory)
    assert {"lm_head"} <= set(forms.linear)
    config, tensors = load_adapter(directory)
    lean = {name: value for name, value in tensors.items() if "lm_head" not in name}
    with pytest.raises(MalformedAdapter, match=r"ensure_weight_tying.*lm_head"):
        decoded(model, write_adapter(tmp_path / "b", config, lean))
    with pytest.raises(UnsupportedAdapter, match="does not target"):
        decoded(model, write_adapter(tmp_path / "c", config | {"ensure_weight_tying": False}, tensors))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_table_that_was_trained_beside_its_factors_is_kept(tied: bool, tmp_path: Path) -> None:
    """PEFT loads it into the base itself: where both are one weight, into both."""
    model = tiny_base("qwen2", tied=tied)
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["lm_head", "q_proj"]))
    generator = torch.Generator().manual_seed(3)
    name = f"{PREFIX}lm_head.base_layer.weight"
    tensors[name] = tensors[name] + 0.1 * torch.randn(tensors[name].shape, generator=generator)
    directory = write_adapter(tmp_path / "b", config, tensors)
    forms, _ = assert_equals_peft(model, directory)
    assert ("model.embed_tokens" in forms.embeddings) == tied


def test_a_copy_that_was_rounded_is_the_bases_own(tmp_path: Path) -> None:
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["lm_head"]))
    half = {name: v.bfloat16() if "base_layer" in name else v for name, v in tensors.items()}
    forms = decoded(model, write_adapter(tmp_path / "b", config, half)).forms
    assert "lm_head" not in forms.changes


def test_without_the_base_a_copy_is_kept(tmp_path: Path) -> None:
    model = tiny_base("llama")
    directory = make_lora(model, tmp_path, targets=["lm_head", "embed_tokens"])
    forms = decoded(model, directory, with_base=False).forms
    assert forms.changes["lm_head"].replacement is not None
    assert error_against_peft(model, directory, forms) < 2e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pissa_on_the_head_uses_the_stored_table(tied: bool, tmp_path: Path) -> None:
    """The stored table is what the initialisation left; PEFT changed the embedding with it where both are one."""
    model = tiny_base("qwen2", tied=tied)
    directory = make_lora(model, tmp_path / "a", targets=["lm_head", "q_proj"], init_lora_weights="pissa")
    _, report = assert_equals_peft(model, directory, tolerance=1e-4)
    assert {site.path: site.rank for site in report.sites}["lm_head"] == 4
    config, tensors = load_adapter(directory)
    lean = {name: v for name, v in tensors.items() if "base_layer" not in name}
    without = write_adapter(tmp_path / "b", config, lean)
    if tied:
        with pytest.raises(UnsupportedAdapter, match=r"init_lora_weights.*save_embedding_layers"):
            decoded(model, without)
    else:
        assert_equals_peft(model, without, tolerance=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "error", "sentence"),
    [
        ("model.layers.0.mlp.act_fn.weight", 4, UnsupportedAdapter, "no linear, embedding, head or norm"),
        ("model.layers.9.mlp.up_proj.weight", 4, BaseMismatch, "does not have"),
        ("model.norm.weight", 63, BaseMismatch, "needs [64]"),
        ("model.norm.bias", 64, BaseMismatch, "has none"),
        ("model.layers.0.self_attn.q_proj.weight", 64, UnsupportedAdapter, "has an adapter as well"),
        ("model.layers.0.self_attn.q_proj.hada_w1_a", 4, UnsupportedAdapter, "unknown here"),
        ("lm_head.scores", 4, UnsupportedAdapter, "unknown here"),
    ],
)
def test_a_parameter_that_cannot_be_replaced_is_refused_by_name(
    name: str, shape: int, error: type[AdapterError], sentence: str, tmp_path: Path
) -> None:
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"]))
    tensors[PREFIX + name] = torch.ones(shape)
    with pytest.raises(error) as refusal:
        decoded(model, write_adapter(tmp_path / "b", config, tensors))
    assert sentence in str(refusal.value)
    assert refusal.value.tensor == PREFIX + name


def test_a_listed_module_without_tensors_is_malformed(tmp_path: Path) -> None:
    model = tiny_base("llama")
    saved = make_lora(model, tmp_path / "a", targets=["q_proj"], modules_to_save=["norm"])
    config, tensors = load_adapter(saved)
    lean = {name: v for name, v in tensors.items() if "layers.1.input_layernorm" not in name}
    with pytest.raises(MalformedAdapter, match=r'modules_to_save" means "model.layers.1.input_layernorm"'):
        decoded(model, write_adapter(tmp_path / "b", config, lean))
    config["modules_to_save"] = [*config["modules_to_save"], "v_head"]
    report = decoded(model, write_adapter(tmp_path / "c", config, tensors)).report
    assert any("v_head" in warning for warning in report.warnings)


def test_a_head_that_is_listed_and_lacking_is_malformed_where_it_is_tied_too(tmp_path: Path) -> None:
    model = tiny_base("qwen2", tied=True)
    names = ["embed_tokens", "lm_head"]
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"], modules_to_save=names))
    del tensors[f"{PREFIX}lm_head.weight"]
    with pytest.raises(MalformedAdapter, match=r'modules_to_save" means "lm_head"'):
        decoded(model, write_adapter(tmp_path / "b", config, tensors))


def test_a_replacement_equal_to_the_base_changes_nothing(tmp_path: Path) -> None:
    model = tiny_base("llama")
    config, tensors = load_adapter(make_lora(model, tmp_path / "a", targets=["q_proj"]))
    tensors[f"{PREFIX}model.norm.weight"] = model.get_parameter("model.norm.weight").detach().clone()
    forms = decoded(model, write_adapter(tmp_path / "b", config, tensors)).forms
    assert not forms.norms


def test_modules_to_save_in_the_name_is_left_out(tmp_path: Path) -> None:
    """Some exporters keep PEFT's names in memory: modules_to_save.default, and the base's own beside it."""
    model = tiny_base("llama")
    saved = make_lora(model, tmp_path / "a", targets=["q_proj"], modules_to_save=["model.norm"])
    config, tensors = load_adapter(saved)
    name = f"{PREFIX}model.norm.weight"
    long = {**tensors, f"{PREFIX}model.norm.modules_to_save.default.weight": tensors[name]}
    del long[name]
    long[f"{PREFIX}model.norm.original_module.weight"] = torch.ones(64)
    forms, report = decoded(model, write_adapter(tmp_path / "b", config, long))
    assert torch.equal(given(forms.norms["model.norm"].weight), tensors[name])
    assert report.irrelevant_tensors == (f"{PREFIX}model.norm.original_module.weight",)


def test_an_adapter_may_only_replace(tmp_path: Path) -> None:
    model = tiny_base("llama")
    saved = make_lora(model, tmp_path / "a", targets=["q_proj"], modules_to_save=["model.norm"])
    config, tensors = load_adapter(saved)
    only = {name: v for name, v in tensors.items() if "norm" in name}
    forms: AdapterForms = decoded(model, write_adapter(tmp_path / "b", config, only)).forms
    assert not forms.linear
    changed = (logits_with(model, forms) - logits_of(model, PROMPT)).abs().max()
    assert float(changed) > 0.05


def roomy(model: Any, num_rows: int) -> Any:
    """The base with so many rows that hooks can look up every token; the rows beyond its own are nonsense."""
    larger = copy.deepcopy(model)
    if num_rows > 256:
        larger.resize_token_embeddings(num_rows, mean_resizing=False)
    return larger


@pytest.mark.parametrize("num_rows", [259, 250], ids=["larger", "smaller"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "lm_head"]], ids=["linears", "tables"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
def test_another_vocabulary_is_that_of_the_resized_model(
    num_rows: int, tied: bool, targets: list[str], use_dora: bool, tmp_path: Path
) -> None:
    model = tiny_base("qwen2", tied=tied)
    resized, directory = resized_adapter(model, num_rows, tmp_path, targets=targets, use_dora=use_dora)
    prompt = [token % 250 for token in PROMPT] + ([257, 258, 256] if num_rows > 256 else [])
    forms, _ = decoded(model, directory)
    assert forms.vocab_size == (259 if num_rows > 256 else None)
    expected = logits_of(load_oracle(resized, directory), prompt)
    with applied(roomy(model, num_rows), forms, spec_of(model)) as adapted:
        logits = logits_of(adapted, prompt)
    assert float((logits[:, :num_rows] - expected).abs().max()) < 1e-4
    assert bool((logits[:, num_rows:] < -1e4).all())


def test_a_vocabulary_resized_on_one_side_only_is_a_mismatch(tmp_path: Path) -> None:
    model = tiny_base("llama")
    _, directory = resized_adapter(model, 259, tmp_path / "a", targets=["q_proj"])
    config, tensors = load_adapter(directory)
    del tensors[f"{PREFIX}lm_head.weight"]
    with pytest.raises(BaseMismatch, match=r'"model.embed_tokens" 259, "lm_head" 256.*save_embedding_layers=True'):
        decoded(model, write_adapter(tmp_path / "b", config, tensors))
