"""An adapter decoded from its files computes what HF PEFT computes, on every architecture that is served.

A pairwise cover runs always: each architecture meets each level of each factor, and each pair of levels meets
somewhere. The cross product is marked slow.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from peft_core.methods import check, decode
from tests.peft_core.adapter_files import (
    applied,
    greedy,
    load_adapter,
    logits_of,
    read_adapter,
    relative_error,
    shared_model,
    shared_spec,
    smallest_margin,
    write_adapter,
)
from tests.tiny_models import (
    SERVED_ARCHITECTURES,
    all_targets,
    attention_targets,
    load_oracle,
    make_lora,
    random_prompt,
)

TOLERANCE = 1e-5  # relative, on logits in float32
NUM_GENERATED = 12
TARGETS = ("attention", "all", "pattern")
SCALINGS = ("plain", "rank-stabilised", "patterns")
SELECTIONS = ("everywhere", "some layers", "exclusions")
COVER = [
    (arch, TARGETS[j], SCALINGS[(j + i) % 3], SELECTIONS[(2 * j + i // 3) % 3])
    for i, arch in enumerate(SERVED_ARCHITECTURES)
    for j in range(3)
]
CROSS_PRODUCT = list(itertools.product(SERVED_ARCHITECTURES, TARGETS, SCALINGS, SELECTIONS))


def lora_options(arch: str, targets: str, scaling: str, selection: str) -> dict[str, Any]:
    """Arguments of `make_lora` for one case."""
    suffixes = attention_targets(arch) if targets == "attention" else all_targets(arch)
    options: dict[str, Any] = {"rank": 4, "alpha": 8, "targets": suffixes}
    if targets == "pattern":
        layers = "[02]" if selection == "some layers" else r"\d"
        options["targets"] = rf".*\.{layers}\..*({'|'.join(suffixes)})"
    elif selection == "some layers":
        options["layers_to_transform"] = [0, 2]
    if selection == "exclusions":
        options["exclude_modules"] = r".*\.1\..*" if targets == "pattern" else suffixes[:1]
    if scaling == "rank-stabilised":
        options["use_rslora"] = True
    if scaling == "patterns":
        options |= {"rank_pattern": {suffixes[-1]: 6}, "alpha_pattern": {rf".*\.0\..*{suffixes[1]}": 3}}
    return options


def assert_equals_oracle(arch: str, directory: Path) -> None:
    """Logits to 1e-5, greedy tokens exactly (and no near tie that could hide behind luck)."""
    model, prompt = shared_model(arch), random_prompt(40, seed=3)
    config, tensors = read_adapter(directory)
    forms, report = decode(config, tensors, shared_spec(arch))
    assert check(config, tensors.header, shared_spec(arch)) == report
    oracle = load_oracle(model, directory)
    expected_tokens = greedy(oracle, prompt, NUM_GENERATED)
    expected = logits_of(oracle, prompt + expected_tokens)
    assert smallest_margin(expected[len(prompt) - 1 : -1]) > 1e-4
    assert relative_error(logits_of(model, prompt + expected_tokens), expected) > 0.05
    with applied(model, forms):
        assert relative_error(logits_of(model, prompt + expected_tokens), expected) < TOLERANCE
        assert greedy(model, prompt, NUM_GENERATED) == expected_tokens


def test_the_cover_holds_every_pair() -> None:
    factors = (SERVED_ARCHITECTURES, TARGETS, SCALINGS, SELECTIONS)
    for (a, levels_a), (b, levels_b) in itertools.combinations(enumerate(factors), 2):
        met = {(case[a], case[b]) for case in COVER}
        assert met == set(itertools.product(levels_a, levels_b))


@pytest.mark.parametrize(("arch", "targets", "scaling", "selection"), COVER)
def test_a_decoded_adapter_equals_peft(arch: str, targets: str, scaling: str, selection: str, tmp_path: Path) -> None:
    options = lora_options(arch, targets, scaling, selection)
    assert_equals_oracle(arch, make_lora(shared_model(arch), tmp_path, seed=5, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "targets", "scaling", "selection"), CROSS_PRODUCT)
def test_every_combination_equals_peft(arch: str, targets: str, scaling: str, selection: str, tmp_path: Path) -> None:
    options = lora_options(arch, targets, scaling, selection)
    assert_equals_oracle(arch, make_lora(shared_model(arch), tmp_path, seed=7, **options))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_all_linear_means_every_linear_but_the_head(arch: str, tmp_path: Path) -> None:
    directory = make_lora(shared_model(arch), tmp_path / "saved", targets="all-linear", seed=1)
    assert_equals_oracle(arch, directory)
    config, tensors = load_adapter(directory)
    by_hand = write_adapter(tmp_path / "by-hand", config | {"target_modules": "all-linear"}, tensors)
    assert decode_report_paths(arch, by_hand) == decode_report_paths(arch, directory)
    assert not any("head" in path for path in decode_report_paths(arch, directory))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_an_adapter_on_the_head_equals_peft(arch: str, tmp_path: Path) -> None:
    """Tied (gpt2) or not: the head alone is adapted, the embedding stays as it is."""
    saved = make_lora(shared_model(arch), tmp_path / "saved", targets=["lm_head", *attention_targets(arch)], seed=4)
    config, tensors = load_adapter(saved)
    lean = {name: value for name, value in tensors.items() if "base_layer" not in name}
    assert_equals_oracle(arch, write_adapter(tmp_path / "lean", config, lean))


def test_the_orientation_of_stored_factors_does_not_depend_on_fan_in_fan_out(tmp_path: Path) -> None:
    directory = make_lora(shared_model("gpt2"), tmp_path / "true", targets=["c_attn"], fan_in_fan_out=True)
    config, tensors = load_adapter(directory)
    assert_equals_oracle("gpt2", directory)
    for value in (False, None):
        other = write_adapter(tmp_path / str(value), config | {"fan_in_fan_out": value}, tensors)
        assert decode_report_paths("gpt2", other) == decode_report_paths("gpt2", directory)


def test_keys_that_keep_the_adapters_name_are_read(tmp_path: Path) -> None:
    directory = make_lora(shared_model("llama"), tmp_path / "saved", targets=["q_proj"], seed=2)
    config, tensors = load_adapter(directory)
    named = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    assert_equals_oracle("llama", write_adapter(tmp_path / "named", config, named))


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_plain(start: str | bool, tmp_path: Path) -> None:
    targets = attention_targets("llama")
    assert_equals_oracle(
        "llama", make_lora(shared_model("llama"), tmp_path, targets=targets, init_lora_weights=start, seed=8)
    )


def test_half_precision_factors_are_widened_as_peft_widens_them(tmp_path: Path) -> None:
    config, tensors = load_adapter(make_lora(shared_model("qwen2"), tmp_path / "saved", targets=["q_proj"], alpha=5))
    half = {name: value.bfloat16() for name, value in tensors.items()}
    assert_equals_oracle("qwen2", write_adapter(tmp_path / "half", config, half))


def test_a_scaling_that_is_a_little_wrong_is_seen(tmp_path: Path) -> None:
    """Negative control: one percent on alpha is far above the tolerance."""
    directory = make_lora(shared_model("llama"), tmp_path / "saved", targets=["q_proj"], alpha=100, seed=5)
    config, tensors = load_adapter(directory)
    write_adapter(tmp_path / "saved", config | {"lora_alpha": 101}, tensors)
    forms = decode(*read_adapter(directory), shared_spec("llama")).forms
    write_adapter(tmp_path / "saved", config, tensors)
    expected = logits_of(load_oracle(shared_model("llama"), directory), random_prompt(40))
    with applied(shared_model("llama"), forms) as adapted:
        assert relative_error(logits_of(adapted, random_prompt(40)), expected) > 100 * TOLERANCE


def decode_report_paths(arch: str, directory: Path) -> tuple[str, ...]:
    config, tensors = read_adapter(directory)
    return tuple(site.path for site in check(config, tensors.header, shared_spec(arch)).sites)
