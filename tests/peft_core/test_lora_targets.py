"""Which modules a config means: exactly those that HF PEFT would adapt, and the file must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods import check
from peft_core.methods.targets import TargetRule, first_pattern, targeted_sites
from tests.peft_core.adapter_files import LoadedTensors, SavedAdapter, load_adapter, shared_model, shared_spec
from tests.tiny_models import SERVED_ARCHITECTURES, all_targets, make_lora, wrap

MIXTURES = ("mixtral", "qwen3_moe")
PATHS = [path for arch in SERVED_ARCHITECTURES for path, _ in shared_model(arch).named_modules() if path]
ENDINGS = sorted({".".join(path.split(".")[-depth:]) for path in PATHS for depth in (1, 2, 3)})
PATTERNS = [
    r".*q_proj",
    r".*\.(q|k|v)_proj",
    r"model\.layers\.[01]\..*",
    r".*layers\.\d+\.mlp\..*_proj",
    r"q_proj",
    r".*",
    r"(?i).*Q_PROJ",
    r".*\.h\.\d\.attn\.c_attn",
    r"^model.*o_proj$",
    "",
]
name_lists = st.lists(st.one_of(st.sampled_from(ENDINGS), st.sampled_from(PATHS)), min_size=1, max_size=4)
some_layers = st.lists(st.integers(0, 4), min_size=1, max_size=3)
layer_patterns = st.lists(st.sampled_from(["layers", "h", "model.layers", "decoder.layers", "lay.rs"]), max_size=2)


def peft_matches(path: str, **fields: Any) -> bool:
    """PEFT's own decision about one path."""
    return bool(check_target_module_exists(LoraConfig(**fields), path))


@settings(max_examples=150, deadline=None)
@given(
    targets=name_lists, exclude=st.one_of(st.just([]), name_lists), paths=st.lists(st.sampled_from(PATHS), max_size=8)
)
def test_lists_match_as_in_peft(targets: list[str], exclude: list[str], paths: list[str]) -> None:
    rule = TargetRule(frozenset(targets), frozenset(exclude))
    for path in [*paths, *(path for path in PATHS if path.endswith(targets[0]))]:
        expected = peft_matches(path, target_modules=targets, exclude_modules=exclude or None)
        assert rule.matches(path) == expected


@settings(max_examples=150, deadline=None)
@given(targets=name_lists, layers=some_layers, patterns=layer_patterns)
def test_layers_match_as_in_peft(targets: list[str], layers: list[int], patterns: list[str]) -> None:
    rule = TargetRule(frozenset(targets), layers=frozenset(layers), layers_patterns=tuple(patterns))
    for path in (path for path in PATHS if path.endswith(tuple(targets))):
        expected = peft_matches(path, target_modules=targets, layers_to_transform=layers, layers_pattern=patterns)
        assert rule.matches(path) == expected


@settings(max_examples=60, deadline=None)
@given(target=st.sampled_from(PATTERNS[:-1]), exclude=st.sampled_from(PATTERNS), paths=st.lists(st.sampled_from(PATHS)))
def test_expressions_match_as_in_peft(target: str, exclude: str, paths: list[str]) -> None:
    rule = TargetRule(target, exclude or frozenset())
    for path in paths:
        assert rule.matches(path) == peft_matches(path, target_modules=target, exclude_modules=exclude)


@settings(max_examples=150, deadline=None)
@given(
    patterns=st.lists(
        st.one_of(st.sampled_from(ENDINGS), st.sampled_from(PATTERNS[:-1])).filter(
            lambda pattern: not pattern.startswith("(?")
        ),
        max_size=4,
    ),
    path=st.sampled_from(PATHS),
)
def test_patterns_decide_as_in_peft(patterns: list[str], path: str) -> None:
    found = first_pattern(patterns, path)
    assert (path if found is None else found) == get_pattern_key(patterns, path)


def wrapped_by_peft(arch: str, **fields: Any) -> set[str]:
    tuner: Any = wrap(shared_model(arch), LoraConfig(**fields)).base_model
    return set(tuner.targeted_module_names)


@pytest.mark.parametrize("arch", SERVED_ARCHITECTURES)
def test_the_sites_of_a_rule_are_those_that_peft_wraps(arch: str) -> None:
    names, first = all_targets(arch), all_targets(arch)[0]
    spec = shared_spec(arch)
    assert targeted_sites(TargetRule(frozenset(names)), spec) == wrapped_by_peft(arch, target_modules=names)
    one_layer = targeted_sites(TargetRule(frozenset({first}), layers=frozenset({1})), spec)
    assert one_layer == wrapped_by_peft(arch, target_modules=[first], layers_to_transform=1)
    pattern = rf".*\.[12]\..*{first}"
    expected = wrapped_by_peft(arch, target_modules=pattern)
    if arch in MIXTURES:  # here PEFT rewrites a pattern to the last names, and forgets the layers
        expected = {path for path in expected if ".0." not in path}
    assert targeted_sites(TargetRule(pattern), spec) == expected


@pytest.mark.parametrize("arch", [arch for arch in SERVED_ARCHITECTURES if arch not in MIXTURES])
def test_all_linear_means_what_peft_takes_it_for(arch: str) -> None:
    for word in ("all-linear", "ALL-Linear"):
        sites = targeted_sites(TargetRule(word, exclude=r".*\.1\..*"), shared_spec(arch))
        assert sites == wrapped_by_peft(arch, target_modules=word, exclude_modules=r".*\.1\..*")


@pytest.fixture
def adapter(tmp_path: Path) -> SavedAdapter:
    return SavedAdapter(tmp_path, targets=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ".*q_proj"},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0, 1]},
    ],
)
def test_tensors_of_a_module_that_is_not_targeted_are_refused(adapter: SavedAdapter, fields: dict[str, Any]) -> None:
    assert len(adapter.check().sites) == 6
    error = adapter.refusal(**fields)
    assert isinstance(error, UnsupportedAdapter)
    assert error.tensor is not None
    assert error.tensor in adapter.tensors
    assert error.tensor in str(error)


def test_a_targeted_module_without_tensors_stays_as_in_the_base_and_is_told(adapter: SavedAdapter) -> None:
    report = adapter.check(target_modules=["q_proj", "v_proj", "o_proj"])
    assert len(report.sites) == 6
    (warning,) = report.warnings
    assert "model.layers.0.self_attn.o_proj" in warning


def test_it_is_refused_where_it_would_be_random(adapter: SavedAdapter) -> None:
    error = adapter.refusal(target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    assert (error.field, error.value) == ("init_lora_weights", "false")
    assert "o_proj" in str(error)
    assert adapter.check(init_lora_weights=False).warnings == ()


def test_without_targets_the_file_decides_and_that_is_told(adapter: SavedAdapter) -> None:
    report = adapter.check(target_modules=None)
    assert len(report.sites) == 6
    assert "target_modules" in report.warnings[0]


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, "target_modules", '"c_attn"'),
        ({"target_modules": "encoder.*"}, "target_modules", '"encoder.*"'),
        ({"layers_to_transform": [0, 1, 2, 7]}, "layers_to_transform", "7"),
    ],
)
def test_a_target_that_the_base_lacks_is_refused(
    adapter: SavedAdapter, fields: dict[str, Any], field: str, value: str
) -> None:
    error = adapter.refusal(**fields)
    assert isinstance(error, BaseMismatch)
    assert (error.code, error.field, error.value) == ("base_mismatch", field, value)


@pytest.mark.parametrize("target", ["self_attn", "input_layernorm", "model.norm"])
def test_a_target_that_is_no_linear_is_refused(adapter: SavedAdapter, target: str) -> None:
    error = adapter.refusal(target_modules=["q_proj", "v_proj", target])
    assert isinstance(error, UnsupportedAdapter)
    assert target in str(error)


def test_targeted_experts_without_tensors_stay_as_in_the_base(tmp_path: Path) -> None:
    config, tensors = load_adapter(make_lora(shared_model("mixtral"), tmp_path, targets=["q_proj"]))
    targets = config | {"target_modules": ["q_proj", "down_proj", "gate"]}
    (warning,) = check(targets, LoadedTensors(tensors).header, shared_spec("mixtral")).warnings
    assert "model.layers.0.mlp.experts.down_proj" in warning
    assert "model.layers.0.mlp.gate.weight" in warning


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"target_modules": "(q_proj"}, "target_modules"),
        ({"target_modules": 7}, "target_modules"),
        ({"target_modules": ["q_proj", ""]}, "target_modules"),
        ({"exclude_modules": "*"}, "exclude_modules"),
        ({"layers_to_transform": "0"}, "layers_to_transform"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"layers_to_transform": [0, 1, 2], "layers_pattern": ["("]}, "layers_pattern"),
    ],
)
def test_a_target_field_that_is_no_pattern_or_list_is_refused(
    adapter: SavedAdapter, fields: dict[str, Any], field: str
) -> None:
    error = adapter.refusal(**fields)
    assert isinstance(error, MalformedAdapter)
    assert error.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"target_modules": ".*(q|v)_proj", "layers_to_transform": [0, 1, 2]}, "layers_to_transform"),
        ({"target_modules": ".*(q|v)_proj", "layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": None, "exclude_modules": ["v_proj"]}, "exclude_modules"),
    ],
)
def test_fields_that_could_not_be_honoured_together_are_refused(
    adapter: SavedAdapter, fields: dict[str, Any], field: str
) -> None:
    """PEFT refuses the first three as well when it reads such a config."""
    assert adapter.refusal(**fields).field == field


@pytest.mark.parametrize("layers", [0, [0], [0, 2]])
def test_layers_may_be_one_number_or_a_list(layers: int | list[int], tmp_path: Path) -> None:
    report = SavedAdapter(
        tmp_path, targets=["q_proj", "v_proj"], layers_to_transform=layers, layers_pattern="layers"
    ).check()
    numbers = layers if isinstance(layers, list) else [layers]
    assert [site.path for site in report.sites] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in numbers for name in ("q_proj", "v_proj")
    ]
