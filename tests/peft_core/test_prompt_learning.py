"""Prefixes and virtual tokens: what is read from the files of PEFT, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_core.errors import AdapterError, BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.forms import AdapterForms, KVPrefix
from peft_core.methods import DecodeReport, check, decode
from peft_core.spec import BaseModelSpec
from peft_core.traits import traits_of
from tests.peft_core.adapter_files import LoadedTensors, load_adapter, shared_model, shared_spec
from tests.plain_forms import applied
from tests.prompt_adapters import KINDS, PREFIXES, TASK, make_prompt_adapter, num_kv_heads, oracle_logits, plain_logits
from tests.tiny_models import HEAD_DIM, load_oracle, random_prompt

PROMPT, ANSWER = random_prompt(9, seed=1), random_prompt(4, seed=2)
P = 5
ARCHITECTURES = ("llama", "qwen3", "gpt2", "gemma2", "gemma3", "mistral", "opt")


@cache
def spec_of(arch: str) -> BaseModelSpec:
    return replace(shared_spec(arch), num_kv_heads=num_kv_heads(shared_model(arch)), head_dim=HEAD_DIM)


def forms_of(arch: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AdapterForms:
    return decode(config, LoadedTensors(tensors), spec_of(arch)).forms


def report_of(arch: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> DecodeReport:
    return check(config, LoadedTensors(tensors).header, spec_of(arch))


@pytest.fixture
def prefix(tmp_path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return load_adapter(make_prompt_adapter("prefix", shared_model("llama"), tmp_path / "a", num_tokens=P))


@pytest.fixture
def prompt(tmp_path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return load_adapter(make_prompt_adapter("prompt", shared_model("llama"), tmp_path / "a", num_tokens=P))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_model_with_the_forms_computes_what_peft_computes(arch: str, kind: str, tmp_path: Path) -> None:
    model = shared_model(arch)
    path = make_prompt_adapter(kind, model, tmp_path / "a", num_tokens=P, seed=3)
    forms = forms_of(arch, *load_adapter(path))
    theirs = oracle_logits(load_oracle(model, path), kind, P, PROMPT, ANSWER)
    task = TASK if kind == "multitask" else 0
    assert difference(plain_logits(model, forms, PROMPT, ANSWER, task=task), theirs) <= 1e-4
    assert difference(model_alone(arch), theirs) > 0.1, "the adapter matters"


def model_alone(arch: str) -> np.ndarray:
    with torch.inference_mode():
        logits = shared_model(arch)(input_ids=torch.tensor([PROMPT + ANSWER]), use_cache=False).logits[0]
    rows: np.ndarray = logits[len(PROMPT) - 1 : -1].double().numpy()
    return rows


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_first_real_token_stands_after_the_virtual_ones(arch: str, tmp_path: Path) -> None:
    model = shared_model(arch)
    path = make_prompt_adapter("prefix", model, tmp_path / "a", num_tokens=P)
    forms = forms_of(arch, *load_adapter(path))
    theirs = oracle_logits(load_oracle(model, path), "prefix", P, PROMPT, ANSWER)
    assert forms.prefix is not None
    assert forms.prefix.first_position == P
    elsewhere = replace(forms, prefix=replace(forms.prefix, first_position=0))
    assert difference(plain_logits(model, elsewhere, PROMPT, ANSWER), theirs) > 0.05


def test_a_prefix_is_cut_into_layers_then_keys_and_values_then_heads(
    prefix: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    config, tensors = prefix
    spec = spec_of("llama")
    sizes = (P, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    tensors["prompt_embeddings"] = torch.arange(math.prod(sizes), dtype=torch.float32).view(P, -1)
    cut = forms_of("llama", config, tensors).prefix
    assert cut is not None
    whole = tensors["prompt_embeddings"].view(sizes)
    assert torch.equal(cut.keys[2, 4], whole[4, 2, 0])
    assert torch.equal(cut.values[1, 3], whole[3, 1, 1])
    assert cut.keys.shape == cut.values.shape == (spec.num_layers, P, spec.num_kv_heads, spec.head_dim)


def test_traits_tell_the_engine_what_to_lay_out(tmp_path: Path) -> None:
    model = shared_model("llama")
    found = {}
    for kind in KINDS:
        path = make_prompt_adapter(kind, model, tmp_path / kind, num_tokens=P)
        traits = traits_of(forms_of("llama", *load_adapter(path)))
        found[kind] = (traits.num_virtual_tokens, traits.first_position, traits.has_prefix, traits.num_tasks)
    assert found == {kind: (P, P, kind in PREFIXES, 3 if kind == "multitask" else 0) for kind in KINDS}


def test_the_report_says_what_was_set_aside(prefix: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    config, tensors = prefix
    report = report_of("llama", config, tensors)
    assert (report.kind, report.sites, report.forms, report.needs_base) == ("PREFIX_TUNING", (), ("prefix",), False)
    assert report.num_parameters == tensors["prompt_embeddings"].numel()
    assert {"prefix_projection", "encoder_hidden_size"} <= set(report.irrelevant_fields)


@pytest.mark.parametrize("kind", ["projected prefix", "p-tuning", "p-tuning lstm"])
def test_sizes_of_encoders_mean_nothing_any_more(kind: str, tmp_path: Path) -> None:
    config, tensors = load_adapter(make_prompt_adapter(kind, shared_model("llama"), tmp_path / "a", num_tokens=P))
    assert list(tensors) == ["prompt_embeddings"], "the file is evaluated already"
    before = forms_of("llama", config, tensors)
    sizes = {"encoder_hidden_size": 7} | ({} if "prefix" in kind else {"encoder_num_layers": 99})
    after = forms_of("llama", {**config, **sizes}, tensors)
    assert _same(before, after)


def _same(a: AdapterForms, b: AdapterForms) -> bool:
    if a.virtual is not None and b.virtual is not None:
        return torch.equal(a.virtual.rows, b.virtual.rows)
    assert a.prefix is not None
    assert b.prefix is not None
    return torch.equal(a.prefix.keys, b.prefix.keys) and torch.equal(a.prefix.values, b.prefix.values)


def test_every_task_has_rows_of_its_own(tmp_path: Path) -> None:
    model = shared_model("llama")
    path = make_prompt_adapter("multitask", model, tmp_path / "a", num_tokens=P)
    forms, oracle = forms_of("llama", *load_adapter(path)), load_oracle(model, path)
    all_rows = []
    for task in range(3):
        theirs = oracle_logits(oracle, "multitask", P, PROMPT, ANSWER, task=task)
        assert difference(plain_logits(model, forms, PROMPT, ANSWER, task=task), theirs) <= 1e-4
        all_rows.append(theirs)
    assert difference(all_rows[0], all_rows[2]) > 0.05


# replaced modules


@pytest.mark.parametrize(("arch", "norm", "head"), [("llama", "norm", "lm_head"), ("qwen2", "norm", "lm_head")])
def test_replaced_modules_bear_one_prefix_only_and_act_on_virtual_tokens_too(
    arch: str, norm: str, head: str, tmp_path: Path
) -> None:
    model = shared_model(arch)
    path = make_prompt_adapter("prompt", model, tmp_path / "a", num_tokens=P, modules_to_save=[norm, head])
    config, tensors = load_adapter(path)
    assert "base_model.model.norm.weight" in tensors
    forms = forms_of(arch, config, tensors)
    assert {"model.norm", "model.layers.0.input_layernorm"} <= set(forms.norms), "every name that ends so"
    theirs = oracle_logits(load_oracle(model, path), "prompt", P, PROMPT, ANSWER)
    with applied(model, forms, spec_of(arch)):
        assert difference(plain_logits(model, forms, PROMPT, ANSWER), theirs) <= 1e-4
    assert difference(plain_logits(model, forms, PROMPT, ANSWER), theirs) > 0.05


def test_keys_of_virtual_tokens_are_made_by_the_replaced_modules(tmp_path: Path) -> None:
    """Negative control: made once by the plain base and kept, as a server may be tempted to, they are others."""
    model = shared_model("llama")
    path = make_prompt_adapter("prompt", model, tmp_path / "a", num_tokens=P, modules_to_save=["layernorm"])
    forms = forms_of("llama", *load_adapter(path))
    theirs = oracle_logits(load_oracle(model, path), "prompt", P, PROMPT, ANSWER)
    assert forms.virtual is not None
    differences = {}
    for maker in ("plain", "replaced"):
        with applied(model, forms if maker == "replaced" else AdapterForms(), spec_of("llama")), torch.inference_mode():
            made = model(inputs_embeds=forms.virtual.rows, use_cache=True).past_key_values
        keys, values = (
            torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in made.layers])
            for name in ("keys", "values")
        )
        with applied(model, forms, spec_of("llama")):
            kept = AdapterForms(prefix=KVPrefix(keys, values, P))
            differences[maker] = difference(plain_logits(model, kept, PROMPT, ANSWER), theirs)
    assert differences["replaced"] <= 1e-4
    assert differences["plain"] > 0.05


def test_two_prefixes_are_another_module(prompt: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    config, tensors = prompt
    tensors["base_model.model.model.norm.weight"] = torch.ones(64)
    with pytest.raises(BaseMismatch, match=r"model\.model\.norm"):
        report_of("llama", config, tensors)


def test_a_listed_module_without_a_tensor_is_refused(prompt: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    config, tensors = prompt
    with pytest.raises(MalformedAdapter, match="modules_to_save"):
        report_of("llama", {**config, "modules_to_save": ["lm_head"]}, tensors)


def test_a_replaced_head_of_a_tied_base_leaves_the_embedding_alone(tmp_path: Path) -> None:
    model = shared_model("gpt2")
    path = make_prompt_adapter("prompt", model, tmp_path / "a", num_tokens=P, modules_to_save=["lm_head"])
    forms = forms_of("gpt2", *load_adapter(path))
    assert not forms.embeddings
    theirs = oracle_logits(load_oracle(model, path), "prompt", P, PROMPT, ANSWER)
    with applied(model, forms, spec_of("gpt2")):
        assert difference(plain_logits(model, forms, PROMPT, ANSWER), theirs) <= 1e-4


# the scale of Gemma


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "multitask"])
def test_rows_trained_under_an_older_transformers_get_the_scale_that_somebody_says(kind: str, tmp_path: Path) -> None:
    config, tensors = load_adapter(make_prompt_adapter(kind, shared_model("gemma2"), tmp_path / "a", num_tokens=P))
    plain = forms_of("gemma2", config, tensors).virtual
    scaled = forms_of("gemma2", {**config, "veneer_prompt_embed_scale": "sqrt_d"}, tensors).virtual
    same = forms_of("gemma2", {**config, "veneer_prompt_embed_scale": 1}, tensors).virtual
    assert plain is not None
    assert scaled is not None
    assert same is not None
    torch.testing.assert_close(scaled.rows, plain.rows * 8.0)  # the hidden size is 64
    assert torch.equal(same.rows, plain.rows)


def test_where_the_scale_may_be_missing_the_report_warns(
    prompt: tuple[dict[str, Any], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    config, tensors = load_adapter(make_prompt_adapter("prompt", shared_model("gemma2"), tmp_path / "g", num_tokens=P))
    assert any("transformers 4" in warning for warning in report_of("gemma2", config, tensors).warnings)
    said = {**config, "veneer_prompt_embed_scale": 1}
    assert report_of("gemma2", said, tensors).warnings == ()
    assert report_of("llama", *prompt).warnings == ()


@pytest.mark.parametrize(("arch", "value"), [("gemma2", "auto"), ("gemma2", True), ("llama", "sqrt_d"), ("gemma2", 8)])
def test_another_scale_is_refused(arch: str, value: object, tmp_path: Path) -> None:
    config, tensors = load_adapter(make_prompt_adapter("prompt", shared_model(arch), tmp_path / "a", num_tokens=P))
    with pytest.raises(UnsupportedAdapter, match="veneer_prompt_embed_scale"):
        report_of(arch, {**config, "veneer_prompt_embed_scale": value}, tensors)


def test_a_prefix_takes_no_scale(prefix: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    config, tensors = prefix
    with pytest.raises(UnsupportedAdapter, match="veneer_prompt_embed_scale"):
        report_of("llama", {**config, "veneer_prompt_embed_scale": "sqrt_d"}, tensors)


# refusals

FIELDS: list[tuple[str, object, type[AdapterError]]] = [
    ("num_transformer_submodules", 2, UnsupportedAdapter),
    ("task_type", "SEQ_2_SEQ_LM", UnsupportedAdapter),
    ("num_virtual_tokens", P + 1, MalformedAdapter),
    ("num_virtual_tokens", "many", MalformedAdapter),
    ("token_dim", 48, BaseMismatch),
    ("target_modules", ["q_proj"], UnsupportedAdapter),
    ("rotate", 3, UnsupportedAdapter),
]


@pytest.mark.parametrize(("field", "value", "error"), FIELDS)
@pytest.mark.parametrize("kind", ["prefix", "prompt", "multitask"])
def test_a_field_that_is_not_honoured_is_refused_by_name(
    kind: str, field: str, value: object, error: type[AdapterError], tmp_path: Path
) -> None:
    config, tensors = load_adapter(make_prompt_adapter(kind, shared_model("llama"), tmp_path / "a", num_tokens=P))
    report_of("llama", config, tensors)
    with pytest.raises(error, match=field):
        report_of("llama", {**config, field: value}, tensors)


@pytest.mark.parametrize(("field", "value"), [("num_layers", 4), ("num_attention_heads", 4), ("token_dim", 64)])
def test_a_prefix_of_other_keys_is_another_bases(
    field: str, value: int, prefix: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    config, tensors = prefix
    with pytest.raises(BaseMismatch, match=field):
        report_of("llama", {**config, field: value}, tensors)


@pytest.mark.parametrize(("field", "value"), [("num_tasks", 4), ("num_ranks", 3)])
def test_tasks_that_the_file_does_not_have_are_malformed(field: str, value: int, tmp_path: Path) -> None:
    config, tensors = load_adapter(make_prompt_adapter("multitask", shared_model("llama"), tmp_path / "a"))
    with pytest.raises(MalformedAdapter, match=field):
        report_of("llama", {**config, field: value}, tensors)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "multitask"])
def test_every_tensor_is_needed_and_no_other_is_taken(kind: str, tmp_path: Path) -> None:
    config, tensors = load_adapter(make_prompt_adapter(kind, shared_model("llama"), tmp_path / "a", num_tokens=P))
    for name in tensors:
        rest = {other: value for other, value in tensors.items() if other != name}
        with pytest.raises(MalformedAdapter, match=f'needs a tensor "{name}"'):
            report_of("llama", config, rest)
    for name in ("prompt_encoder.default.embedding.weight", "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"):
        with pytest.raises(AdapterError, match=name.replace(".", r"\.")):
            report_of("llama", config, {**tensors, name: torch.ones(4, 4)})


@pytest.mark.parametrize(
    ("shape", "error"),
    [((P, 63), BaseMismatch), ((P, 2, 32), MalformedAdapter), ((P, 0), MalformedAdapter), ((4096, 64), BaseMismatch)],
)
def test_rows_of_another_shape_are_refused(
    shape: tuple[int, ...], error: type[AdapterError], prompt: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    config, _ = prompt
    with pytest.raises(error, match="prompt_embeddings"):
        report_of("llama", {**config, "num_virtual_tokens": shape[0]}, {"prompt_embeddings": torch.zeros(shape)})


def test_a_broken_number_is_refused(prefix: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    config, tensors = prefix
    tensors["prompt_embeddings"][2, 3] = torch.nan
    with pytest.raises(MalformedAdapter, match="NaN"):
        forms_of("llama", config, tensors)


def test_a_prefix_needs_to_know_the_bases_keys(prefix: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    config, tensors = prefix
    with pytest.raises(UnsupportedAdapter, match="what those of this base look like"):
        check(config, LoadedTensors(tensors).header, replace(spec_of("llama"), num_kv_heads=0))
