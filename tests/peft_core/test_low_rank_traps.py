"""What is easy to get wrong about single low-rank kinds, each against PEFT itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from peft_core.errors import AdapterError, MalformedAdapter, UnsupportedAdapter
from peft_core.methods import check, decode
from peft_core.methods.low_rank.decompositions import decomposition_warnings
from peft_core.methods.report import Decoded
from tests.peft_core.adapter_files import (
    Entry,
    LoadedTensors,
    load_adapter,
    logits_of,
    read_adapter,
    shared_model,
    shared_spec,
    write_adapter,
)
from tests.peft_core.low_rank_samples import SAMPLES
from tests.peft_core.tuner_samples import LINEAR_ONLY, ModelWeights, Sample, decoded, make_sample, save, wrapped
from tests.plain_forms import applied
from tests.tiny_models import load_oracle, random_prompt

PROMPT = random_prompt(24, seed=3)
Q_PROJ, V_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def difference(found: Decoded, expected: torch.Tensor, arch: str = "llama") -> float:
    with applied(shared_model(arch), found.forms, shared_spec(arch)) as model:
        return float((logits_of(model, PROMPT) - expected).abs().max())


def sample(name: str, directory: Path, **fields: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return load_adapter(make_sample(SAMPLES[name], "llama", directory, **fields))


def refused(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AdapterError:
    with pytest.raises(AdapterError) as refusal:
        check(config, LoadedTensors(tensors).header, shared_spec("llama"))
    return refusal.value


def pruned_adalora(directory: Path) -> Path:
    """Four of six ranks left of one module, none of another."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=12, total_step=10, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted = wrapped(shared_model("llama"), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    masks = {f"model.layers.{i}.self_attn.{part}_proj": [True] * 6 for i in range(3) for part in "qv"}
    masks |= {Q_PROJ: [True, False, True, True, False, True], V_PROJ: [False] * 6}
    adapted.peft_config["default"].rank_pattern = {f"{path}.lora_E": mask for path, mask in masks.items()}
    save(adapted, directory)
    return directory


def test_pruned_adalora_keeps_the_divisor_from_before(tmp_path: Path) -> None:
    directory = pruned_adalora(tmp_path)
    expected = logits_of(load_oracle(shared_model("llama"), directory), PROMPT)
    found = decoded(directory, "llama")
    assert difference(found, expected) < 5e-5
    ranks = {site.path: site.rank for site in found.report.sites}
    assert ranks[Q_PROJ] == 4
    assert V_PROJ not in ranks
    assert V_PROJ not in found.forms.linear
    assert any(V_PROJ in sentence for sentence in found.report.warnings)
    assert {site.scaling for site in found.report.sites} == {12 / (6 + 1e-5)}

    config, tensors = read_adapter(directory)
    wrong = decode(config | {"lora_alpha": 12 * 6 / 4}, tensors, shared_spec("llama"))  # as if divided by what is left
    assert difference(wrong, expected) > 1e-2


def test_adalora_must_agree_with_its_pruning(tmp_path: Path) -> None:
    config, tensors = load_adapter(pruned_adalora(tmp_path))
    others: tuple[dict[str, Any], ...] = ({}, config["rank_pattern"] | {f"{Q_PROJ}.lora_E": [True] * 6})
    for masks in others:
        assert "rank" in str(refused(config | {"rank_pattern": masks}, tensors))
    odd: tuple[object, ...] = ([4], {"q_proj": 4}, {f"{Q_PROJ}.lora_E": [1, 0]})
    for pattern in odd:
        assert refused(config | {"rank_pattern": pattern}, tensors).field == "rank_pattern"
    named = {key.replace(".lora_E", ".lora_E.default"): mask for key, mask in config["rank_pattern"].items()}
    check(config | {"rank_pattern": named}, LoadedTensors(tensors).header, shared_spec("llama"))


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "target_parameters", "layer_replication", "kasa_config"])
def test_adalora_refuses_what_only_lora_has(field: str, tmp_path: Path) -> None:
    config, tensors = sample("adalora", tmp_path)
    assert refused(config | {field: True}, tensors).field == field
    assert refused(config | {"init_lora_weights": "pissa"}, tensors).field == "init_lora_weights"


@pytest.mark.parametrize(("prefix", "rows"), [("vera", 1), ("pvera", 2)])
def test_matrices_that_are_not_stored_are_drawn_for_the_largest_target(prefix: str, rows: int, tmp_path: Path) -> None:
    """The recipe itself, beside the comparison with PEFT: one generator, A first, as large as the largest target."""
    directory = make_sample(SAMPLES[f"{prefix}, drawn"], "llama", tmp_path)
    _, tensors = load_adapter(directory)
    generator = torch.Generator().manual_seed(7)
    drawn = []
    for shape in ((rows * 8, 128), (128, 8)):  # down_proj has 128 inputs, up_proj 128 outputs
        bound = math.sqrt(6 / shape[1])
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    delta = decoded(directory, "llama").forms.linear[Q_PROJ]
    gain = tensors[f"base_model.model.{Q_PROJ}.{prefix}_lambda_d"][:8]
    torch.testing.assert_close(delta.down, gain[:, None] * drawn[0][:8, :64])
    gain = tensors[f"base_model.model.{Q_PROJ}.{prefix}_lambda_b"]
    torch.testing.assert_close(delta.up, gain[:, None] * drawn[1][:64])


def test_matrices_for_fewer_targets_are_other_matrices(tmp_path: Path) -> None:
    """Negative control: attention only is at most 64 wide, so the same key draws other values."""
    narrow = SAMPLES["vera, drawn"]._replace(everywhere=False)
    directory = make_sample(narrow, "llama", tmp_path)
    expected = logits_of(load_oracle(shared_model("llama"), directory), PROMPT)
    assert difference(decoded(directory, "llama"), expected) < 5e-5
    config, tensors = read_adapter(directory)
    wrong = decode(config | {"target_modules": [*config["target_modules"], "down_proj"]}, tensors, shared_spec("llama"))
    assert difference(wrong, expected) > 1e-2


def test_vera_without_matrices_and_without_targets_is_refused(tmp_path: Path) -> None:
    config, tensors = sample("vera, drawn", tmp_path)
    error = refused(config | {"target_modules": None}, tensors)
    assert error.field == "target_modules"
    assert refused(config | {"save_projection": True}, tensors).field == "save_projection"
    assert refused(config | {"projection_prng_key": -1}, tensors).field == "projection_prng_key"


def test_sampling_pvera_is_refused(tmp_path: Path) -> None:
    config, tensors = sample("pvera", tmp_path)
    error = refused(config | {"sample_at_inference": True}, tensors)
    assert isinstance(error, UnsupportedAdapter)
    assert (error.field, error.value) == ("sample_at_inference", "true")
    assert "differently" in str(error)
    check(config | {"generator_seed": 3}, LoadedTensors(tensors).header, shared_spec("llama"))


def test_unilora_needs_its_targets(tmp_path: Path) -> None:
    config, tensors = sample("unilora", tmp_path)
    for field, value in (("target_modules", None), ("proj_seed", -3), ("proj_seed", True), ("theta_d_length", 0)):
        assert refused(config | {field: value}, tensors).field == field
    assert isinstance(refused(config | {"theta_d_length": 99}, tensors), MalformedAdapter)


def test_miss_of_the_former_name_is_read(tmp_path: Path) -> None:
    for index, start in enumerate((True, "bat")):
        directory = make_sample(SAMPLES["miss"], "llama", tmp_path / str(index), init_weights=start)
        expected = logits_of(load_oracle(shared_model("llama"), directory), PROMPT)
        config, tensors = load_adapter(directory)
        bone = {field: config[field] for field in config if field not in ("mini_r", "miss_dropout")}
        renamed = {name.replace("miss_block", "bone_block"): value for name, value in tensors.items()}
        write_adapter(tmp_path / f"bone{index}", bone | {"peft_type": "BONE"}, renamed)
        found = decoded(tmp_path / f"bone{index}", "llama")
        assert found.report.kind == "BONE"
        assert difference(found, expected) < 5e-5
        assert refused(bone | {"peft_type": "BONE"}, tensors).tensor is not None, "names of MiSS"
        error = refused(bone | {"peft_type": "BONE", "init_weights": "mini"}, renamed)
        assert error.field == "init_weights"


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("miss", "init_weights", "olive"),
        ("miss, mini", "mini_r", 5),
        ("miss, bat", "r", 5),
        ("gralora", "gralora_k", 3),
        ("gralora", "hybrid_r", -1),
        ("vblora", "vector_length", 10),
        ("vblora", "topk", 13),
        ("tinylora", "weight_tying", 1.5),
        ("tinylora", "u", 4),
        ("deft", "decomposition_method", "svd"),
        ("psoft", "ab_svd_init", "other"),
        ("psoft", "psoft_svd", "other"),
        ("psoft", "psoft_alpha", 0),
        ("peanut", "act_fn", "snake"),
        ("peanut", "depth", 1),
        ("peanut", "depth", 10**9),
        ("osf", "effective_rank", "all"),
        ("osf, patterns", "rank_pattern", {"(": 3}),
        ("osf, patterns", "rank_pattern", 3),
        ("loha", "rank_pattern", {"q_proj": 5}),
        ("delora", "alpha_pattern", {"q_proj": 5}),
        ("hra", "apply_GS", "yes"),
        ("psoft, series", "num_cayley_neumann_terms", 10**9),
        ("psoft, randomised", "psoft_svd_lowrank_niter", 10**9),
        ("unilora", "r", 10**9),
        ("vera, drawn", "r", 10**9),
    ],
)
def test_a_value_that_cannot_be_is_told(name: str, field: str, value: object, tmp_path: Path) -> None:
    config, tensors = sample(name, tmp_path)
    error = refused(config | {field: value}, tensors)
    assert error.field == field or error.tensor is not None
    assert len(str(error)) < 400


def test_tinylora_on_other_tables_is_refused(tmp_path: Path) -> None:
    for arch, table in (("gemma2", "embed_tokens"), ("gpt2", "wpe")):
        directory = make_sample(SAMPLES["tinylora"], arch, tmp_path / arch, target_modules=[table])
        with pytest.raises(UnsupportedAdapter, match=table) as refusal:
            decoded(directory, arch)
        assert refusal.value.tensor is not None


def test_tinylora_of_another_tying_is_told(tmp_path: Path) -> None:
    config, tensors = sample("tinylora, tied", tmp_path)
    assert isinstance(refused(config | {"weight_tying": 0.0}, tensors), MalformedAdapter)
    assert "belongs to no module" in str(refused(config | {"weight_tying": 1.0}, tensors))


def test_reflections_of_equal_pairs_cancel(tmp_path: Path) -> None:
    """How HRA starts: each direction twice, so nothing changes."""
    directory = make_sample(SAMPLES["hra"]._replace(spread=0.0), "llama", tmp_path)
    base = logits_of(shared_model("llama"), PROMPT)
    assert difference(decoded(directory, "llama"), base) < 5e-5


def huge(tensors: dict[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """The header with other shapes by the end of a name; such tensors need not exist to be refused."""
    header = LoadedTensors(tensors).header
    for name, entry in header.items():
        shape = next((shape for ending, shape in shapes.items() if name.endswith(ending)), entry.shape)
        header[name] = Entry(entry.dtype, shape)
    return header


def test_factors_that_outgrow_the_matrix_beyond_measure_are_refused(tmp_path: Path) -> None:
    config, tensors = sample("vera", tmp_path / "vera", target_modules=["q_proj"])
    rank = 2**24
    shapes = {"lambda_d": (rank,), "vera_A": (rank, 64), "vera_B": (64, rank)}
    with pytest.raises(UnsupportedAdapter, match="smaller rank") as refusal:
        check(config | {"r": rank}, huge(tensors, shapes), shared_spec("llama"))
    assert refusal.value.field == "r"
    config, tensors = sample("tinylora, drawn", tmp_path / "tinylora")
    names = {name: (2**25,) for name in tensors if ".tinylora_v." in name}
    with pytest.raises(UnsupportedAdapter, match="save_projection=True"):
        check(config | {"u": 2**25}, huge(tensors, names), shared_spec("llama"))


def test_an_absurd_rank_is_a_matrix_and_counts_as_one(tmp_path: Path) -> None:
    config, tensors = sample("loha, wide", tmp_path)
    header = LoadedTensors(tensors).header
    report = check(config, header, shared_spec("llama"))
    sites = [shared_spec("llama").sites[site.path] for site in report.sites]
    assert report.ranks == ()
    assert report.forms == ("dense",)
    assert report.dense_bytes == sum(4 * site.in_features * site.out_features for site in sites)
    with pytest.raises(UnsupportedAdapter) as refusal:
        check(config, header, shared_spec("llama"), max_dense_bytes=report.dense_bytes - 1)
    assert refusal.value.code == "dense_adapter_too_large"


POLY = Sample(peft.PolyConfig, {"r": 4, "n_tasks": 3, "n_skills": 4, "n_splits": 2}, LINEAR_ONLY, 0.3, {"router": 1.0})


@pytest.mark.parametrize("arch", LINEAR_ONLY)
def test_a_task_of_poly_is_that_of_peft(arch: str, tmp_path: Path) -> None:
    directory = make_sample(POLY, arch, tmp_path)
    oracle = load_oracle(shared_model(arch), directory)
    with torch.no_grad():
        answers = [oracle(torch.tensor([PROMPT]), task_ids=torch.tensor([task])).logits[0] for task in range(3)]
    config, _ = read_adapter(directory)
    for task, expected in enumerate(answers):
        (directory / "adapter_config.json").write_text(json.dumps(config | {"task_id": task}))
        found = decoded(directory, arch)
        assert difference(found, expected, arch) < 5e-5
        assert difference(found, answers[task - 1], arch) > 1e-2


def test_poly_of_several_tasks_asks_which(tmp_path: Path) -> None:
    config, tensors = load_adapter(make_sample(POLY, "llama", tmp_path))
    error = refused(config, tensors)
    assert isinstance(error, UnsupportedAdapter)
    assert error.field == "n_tasks"
    assert '"task_id"' in str(error)
    for task in (3, -1, "0", True):
        assert refused(config | {"task_id": task}, tensors).field in ("task_id", "n_tasks")
    assert refused(config | {"task_id": 0, "n_skills": 3}, tensors).tensor is not None
    assert refused(config | {"task_id": 0, "poly_type": "mhr"}, tensors).field == "poly_type"


def test_poly_of_one_task_needs_no_choice(tmp_path: Path) -> None:
    directory = make_sample(POLY, "llama", tmp_path, n_tasks=1)
    oracle = load_oracle(shared_model("llama"), directory)
    with torch.no_grad():
        expected = oracle(torch.tensor([PROMPT]), task_ids=torch.tensor([0])).logits[0]
    assert difference(decoded(directory, "llama"), expected) < 5e-5


def test_a_slow_decomposition_is_told() -> None:
    spec = shared_spec("llama")
    assert decomposition_warnings("OSF", tuple(spec.sites), spec) == ()
    sites = {path: replace(site, in_features=4096, out_features=4096) for path, site in spec.sites.items()}
    (sentence,) = decomposition_warnings("OSF", [Q_PROJ, V_PROJ, "elsewhere"], replace(spec, sites=sites))
    assert "2 weights" in sentence
    assert "about 2 minutes" in sentence


def test_psoft_tells_that_signs_are_not_stored(tmp_path: Path) -> None:
    config, tensors = sample("psoft", tmp_path)
    report = check(config, LoadedTensors(tensors).header, shared_spec("llama"))
    assert any("signs" in sentence for sentence in report.warnings)
    before = torch.random.get_rng_state()
    config, tensors = sample("psoft, randomised", tmp_path / "randomised")
    decode(config, LoadedTensors(tensors), shared_spec("llama"), ModelWeights(shared_model("llama")))
    assert torch.equal(before, torch.random.get_rng_state())
