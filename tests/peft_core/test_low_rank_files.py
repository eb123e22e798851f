"""Damaged, foreign and contradictory files of every low-rank kind are refused by name, most before data is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_core.errors import AdapterError, BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods import check, decode
from peft_core.spec import BaseModelSpec
from tests.peft_core.adapter_files import LoadedTensors, load_adapter, read_adapter, shared_model, shared_spec
from tests.peft_core.low_rank_samples import SAMPLES
from tests.peft_core.tuner_samples import ModelWeights, make_sample
from tests.tiny_models import make_model

KINDS = (
    *("adalora", "loha", "vera", "pvera", "vblora", "vblora, chosen", "unilora", "unilora, indices", "hra", "miss"),
    *("miss, mini", "miss, bat", "delora", "gralora", "tinylora", "osf", "deft", "psoft", "peanut, deep"),
)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Tensors]]:
    @functools.cache
    def load(name: str) -> tuple[dict[str, Any], Tensors]:
        return load_adapter(make_sample(SAMPLES[name], "llama", tmp_path_factory.mktemp("sample")))

    def copied(name: str) -> tuple[dict[str, Any], Tensors]:
        config, tensors = load(name)
        return dict(config), dict(tensors)

    return copied


Loaded = Callable[[str], tuple[dict[str, Any], Tensors]]


def checked(config: dict[str, Any], tensors: Tensors, spec: BaseModelSpec | None = None) -> AdapterError:
    with pytest.raises(AdapterError) as refusal:
        check(config, LoadedTensors(tensors).header, spec or shared_spec("llama"))
    return refusal.value


def first_of_each(tensors: Tensors) -> dict[str, str]:
    """One tensor of each kind of name: by suffix, or by its whole name where modules share it."""
    found: dict[str, str] = {}
    for name in tensors:
        path = next((path for path in shared_spec("llama").sites if f".{path}." in name), "")
        found.setdefault(name.partition(f"{path}.")[2] if path else name, name)
    return found


@pytest.mark.parametrize("name", SAMPLES)
def test_no_data_is_read_for_a_report(name: str, tmp_path: Path) -> None:
    config, tensors = read_adapter(make_sample(SAMPLES[name], "llama", tmp_path))
    report = check(config, tensors.header, shared_spec("llama"))
    assert tensors.num_reads == 0
    decoded = decode(config, tensors, shared_spec("llama"), ModelWeights(shared_model("llama")))
    assert decoded.report == report
    assert {site.path for site in report.sites} >= set(decoded.forms.linear)
    for site in report.sites:
        if site.path in decoded.forms.embeddings:
            continue
        assert (site.path in decoded.forms.linear) == (site.rank > 0)
        if site.rank:
            assert decoded.forms.linear[site.path].rank == site.rank


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_tensor_is_told(name: str, loaded: Loaded) -> None:
    for suffix, missing in first_of_each(loaded(name)[1]).items():
        config, tensors = loaded(name)
        if name in ("hra", "miss", "miss, mini", "miss, bat"):  # one tensor a module: the module is then missing
            del tensors[missing]
            config["init_weights"] = False if name in ("hra", "miss") else config["init_weights"]
            if name.startswith("miss, "):
                assert any("no tensors" in sentence for sentence in report_of(config, tensors).warnings)
                continue
            assert "no tensors" in str(checked(config, tensors))
            continue
        if suffix == "tinylora_P":  # may be drawn again
            continue
        del tensors[missing]
        error = checked(config, tensors)
        assert isinstance(error, MalformedAdapter)
        assert suffix.removeprefix("base_model.") in str(error), suffix


def report_of(config: dict[str, Any], tensors: Tensors) -> Any:
    return check(config, LoadedTensors(tensors).header, shared_spec("llama"))


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_shape_is_told(name: str, loaded: Loaded) -> None:
    for suffix, wrong in first_of_each(loaded(name)[1]).items():
        for spoil in (lambda x: torch.cat([x, x]), lambda x: x[None], lambda x: x[:0], lambda x: x.flatten()[:1]):
            config, tensors = loaded(name)
            spoilt = spoil(tensors[wrong]).clone()
            if spoilt.shape == tensors[wrong].shape or (suffix.endswith("vera_B") and len(spoilt) > 128):
                continue  # random matrices may be larger than needed
            tensors[wrong] = spoilt
            error = checked(config, tensors)
            assert isinstance(error, MalformedAdapter | BaseMismatch)
            assert error.tensor is not None, suffix


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_dtype_is_told(name: str, loaded: Loaded) -> None:
    for wrong in first_of_each(loaded(name)[1]).values():
        config, tensors = loaded(name)
        is_float = tensors[wrong].is_floating_point()
        tensors[wrong] = tensors[wrong].to(torch.int64 if is_float else torch.float32)
        error = checked(config, tensors)
        assert isinstance(error, MalformedAdapter)
        assert "dtype" in str(error)
        assert error.tensor == wrong


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_read(name: str, loaded: Loaded) -> None:
    config, tensors = loaded(name)
    halves = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in tensors.items()}
    forms = decode(config, LoadedTensors(halves), shared_spec("llama"), ModelWeights(shared_model("llama"))).forms
    assert {value.dtype for delta in forms.linear.values() for value in (delta.down, delta.up)} <= {torch.float32}


@pytest.mark.parametrize("name", KINDS)
def test_values_that_are_no_numbers_are_told(name: str, loaded: Loaded) -> None:
    for wrong in first_of_each(loaded(name)[1]).values():
        config, tensors = loaded(name)
        if not tensors[wrong].is_floating_point():
            continue
        tensors[wrong] = tensors[wrong].clone()
        tensors[wrong].view(-1)[-1] = float("nan")
        source = LoadedTensors(tensors)
        with pytest.raises(MalformedAdapter, match="NaN") as refusal:
            decode(config, source, shared_spec("llama"), ModelWeights(shared_model("llama")))
        assert refusal.value.tensor == wrong


@pytest.mark.parametrize("name", KINDS)
def test_values_beyond_all_measure_are_told_or_stay_numbers(name: str, loaded: Loaded) -> None:
    for huge in (3e38, -1e30, 0.0):
        config, tensors = loaded(name)
        floats = {key: value for key, value in tensors.items() if value.is_floating_point()}
        source = LoadedTensors(tensors | {key: torch.full_like(value, huge) for key, value in floats.items()})
        try:
            forms = decode(config, source, shared_spec("llama"), ModelWeights(shared_model("llama"))).forms
        except MalformedAdapter as error:
            assert error.tensor in tensors  # noqa: PT017 - either outcome is right
            continue
        for delta in forms.linear.values():
            assert bool(torch.isfinite(delta.up).all() and torch.isfinite(delta.down).all())


@pytest.mark.parametrize("name", KINDS)
def test_an_unknown_tensor_or_field_is_told(name: str, loaded: Loaded) -> None:
    config, tensors = loaded(name)
    extra = "base_model.model.model.layers.0.self_attn.q_proj.strange_part"
    error = checked(config, {**tensors, extra: torch.ones(3)})
    assert isinstance(error, UnsupportedAdapter)
    assert error.tensor == extra
    shared = "base_model.strange_part"
    assert checked(config, {**tensors, shared: torch.ones(3)}).tensor == shared
    error = checked(config | {"twist": 3}, tensors)
    assert isinstance(error, UnsupportedAdapter)
    assert error.field == "twist"
    assert checked(config | {"task_type": "SEQ_CLS"}, tensors).field == "task_type"


@pytest.mark.parametrize("name", KINDS)
def test_another_rank_in_the_config_is_told(name: str, loaded: Loaded) -> None:
    config, tensors = loaded(name)
    field = {"adalora": "init_r", "osf": "effective_rank"}.get(name, "r")
    if name == "unilora":  # nothing in the file depends on it
        assert report_of(config | {field: 5}, tensors).ranks == (5,)
        return
    for value in (config[field] + 1, 3 * config[field]):
        error = checked(config | {field: value}, tensors)
        assert isinstance(error, MalformedAdapter)
    assert checked(config | {field: "four"}, tensors).field == field


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith(("poly", "unilora"))])
def test_a_start_that_peft_does_not_know_is_told(name: str, loaded: Loaded) -> None:
    """What a targeted module without tensors would be depends on it."""
    config, tensors = loaded(name)
    assert checked(config | {"init_weights": "twisted"}, tensors).field == "init_weights"


@pytest.mark.parametrize("name", KINDS)
def test_another_base_is_told(name: str, loaded: Loaded) -> None:
    config, tensors = loaded(name)
    larger = BaseModelSpec.from_model(make_model("llama", hidden_size=96, num_attention_heads=6), fingerprint="test")
    shallow = BaseModelSpec.from_model(make_model("llama", num_hidden_layers=2), fingerprint="test")
    if name == "unilora":  # all that it stores fits every base; the modules' names do not
        assert isinstance(checked(config, tensors, shared_spec("gpt2")), BaseMismatch)
        return
    if name not in ("miss, mini", "psoft"):  # their tensors are of one size whatever the base
        assert isinstance(checked(config, tensors, larger), BaseMismatch | MalformedAdapter)
    assert isinstance(checked(config, tensors, shallow), BaseMismatch)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "unilora"])
def test_a_module_outside_the_targets_is_told(name: str, loaded: Loaded) -> None:
    config, tensors = loaded(name)
    error = checked(config | {"target_modules": ["q_proj"]}, tensors)
    assert isinstance(error, UnsupportedAdapter)
    assert error.tensor is not None


@pytest.mark.parametrize("name", KINDS)
def test_a_file_without_one_tensor_of_the_kind_is_told(name: str, loaded: Loaded) -> None:
    config, _ = loaded(name)
    assert isinstance(checked(config, {}), MalformedAdapter)
    foreign = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}
    assert isinstance(checked(config, foreign), MalformedAdapter)


@pytest.mark.parametrize("name", ["hra", "osf", "deft", "psoft", "peanut, deep", "miss, bat"])
def test_without_the_base_there_is_a_sentence(name: str, loaded: Loaded) -> None:
    config, tensors = loaded(name)
    assert report_of(config, tensors).needs_base
    with pytest.raises(UnsupportedAdapter, match="base's weights") as refusal:
        decode(config, LoadedTensors(tensors), shared_spec("llama"))
    assert refusal.value.code == "base_weights_needed"


def test_names_with_the_adapters_name_in_them_are_read(loaded: Loaded) -> None:
    config, tensors = loaded("loha")
    renamed = {f"{name}.default": value for name, value in tensors.items()}
    assert report_of(config, renamed) == report_of(config, tensors)


def test_indices_outside_the_bank_are_told(loaded: Loaded) -> None:
    for name, part in (("vblora, chosen", "_topk_indices"), ("unilora, indices", "unilora_indices_A")):
        for index in (-1 if name.startswith("uni") else 200, 12 if name.startswith("vb") else 100):
            config, tensors = loaded(name)
            wrong = next(key for key in tensors if key.endswith(part))
            tensors[wrong] = tensors[wrong].clone()
            tensors[wrong].view(-1)[0] = index
            with pytest.raises(MalformedAdapter, match="indices from"):
                decode(config, LoadedTensors(tensors), shared_spec("llama"))
