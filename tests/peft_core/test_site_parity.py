"""Every kind that changes modules by other forms computes what PEFT computes from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from peft.tuners.waveft.waverec2d import waverec2d

from peft_core.forms import AdapterForms
from peft_core.methods.whole_matrix.wavelets import FILTERS, reconstructed
from tests.peft_core.adapter_files import logits_of, shared_model, shared_spec
from tests.peft_core.site_samples import FORMS, MORE, NEEDS_BASE, SAMPLES, norms_of
from tests.peft_core.tuner_samples import Sample, decoded, make_sample
from tests.plain_forms import applied
from tests.tiny_models import load_oracle, random_prompt

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

PROMPT = random_prompt(12, seed=3)
TOLERANCE = 4e-5  # absolute, of logits with a spread of 2 to 5
VISIBLE = 0.05  # what an adapter must change for a comparison to mean anything


def logits_with(forms: AdapterForms, arch: str) -> torch.Tensor:
    with applied(shared_model(arch), forms, shared_spec(arch)) as model:
        return logits_of(model, PROMPT)


def assert_as_peft(directory: Path, arch: str) -> None:
    """The adapter changes the base's logits, and exactly as PEFT does."""
    expected = logits_of(load_oracle(shared_model(arch), directory), PROMPT)
    got = logits_with(decoded(directory, arch).forms, arch)
    assert float((expected - logits_of(shared_model(arch), PROMPT)).abs().max()) > VISIBLE
    assert float(expected.abs().max()) < 60
    assert float((got - expected).abs().max()) <= TOLERANCE


SAMPLES_ON_BASES = [
    pytest.param(name, arch, marks=[pytest.mark.slow] if arch in MORE else [])
    for name, sample in SAMPLES.items()
    for arch in sample.architectures
]


@pytest.mark.parametrize(("name", "arch"), SAMPLES_ON_BASES)
def test_equals_peft(name: str, arch: str, tmp_path: Path) -> None:
    assert_as_peft(make_sample(SAMPLES[name], arch, tmp_path), arch)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "phi3"])
def test_trained_norms_equal_peft(arch: str, tmp_path: Path) -> None:
    sample = Sample(peft.LNTuningConfig, {"target_modules": norms_of(arch)}, (arch,), 0.3)
    assert_as_peft(make_sample(sample, arch, tmp_path), arch)


@pytest.mark.parametrize("name", ["ia3", "oft", "boft", "road_1", "lokr", "hira", "shira", "frod"])
def test_the_head_is_a_module_like_others(name: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["lm_head", "q_proj"]}
    if name == "ia3":
        fields["feedforward_modules"] = []
    assert_as_peft(make_sample(SAMPLES[name], "llama", tmp_path, **fields), "llama")


@pytest.mark.parametrize("name", ["ia3", "oft", "boft", "road_1", "lokr", "c3a", "glora"])
def test_saved_modules_come_along_and_norm_means_every_norm(name: str, tmp_path: Path) -> None:
    """`modules_to_save` names the ends of paths, letter by letter where no dot stands: "norm" is every norm."""
    directory = make_sample(SAMPLES[name], "llama", tmp_path, modules_to_save=["norm"])
    assert_as_peft(directory, "llama")
    assert set(decoded(directory, "llama").forms.norms) == set(shared_spec("llama").norms)


@pytest.mark.parametrize("name", ["oft, biases", "boft, biases"])
def test_saved_biases_are_values_not_differences(name: str, tmp_path: Path) -> None:
    directory = make_sample(SAMPLES[name], "opt", tmp_path)
    forms = decoded(directory, "opt").forms
    path = "model.decoder.layers.0.self_attn.q_proj"
    trained = load_oracle(shared_model("opt"), directory).get_submodule(f"base_model.model.{path}.base_layer").bias
    own, gain = shared_model("opt").get_submodule(path).bias, forms.changes[path].gain
    shift = forms.changes[path].shift
    assert shift is not None
    kept = own if gain is None else gain * own
    assert torch.allclose(shift, trained - kept, atol=1e-6)


@pytest.mark.parametrize("num_factors", [2, 3])
@pytest.mark.parametrize("size", [4, 8])
def test_butterfly_factors_equal_peft(
    num_factors: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT computes several factors with a CUDA extension only; here its block diagonals are made without."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", BlockDiagonal)
    fields = {"boft_n_butterfly_factor": num_factors, "boft_block_size": size}
    directory = make_sample(SAMPLES["boft"], "qwen2", tmp_path, **fields)
    assert_as_peft(directory, "qwen2")
    rotation = decoded(directory, "qwen2").forms.changes["model.layers.0.self_attn.q_proj"].rotation
    assert rotation is not None
    assert rotation.shape[1] == size * 2 ** (num_factors - 1)


def test_one_butterfly_factor_is_read_whatever_the_config_says(tmp_path: Path) -> None:
    directory = make_sample(SAMPLES["boft"], "llama", tmp_path, boft_n_butterfly_factor=2)
    assert_as_peft(directory, "llama")
    assert any("CUDA" in warning for warning in decoded(directory, "llama").report.warnings)


@pytest.mark.parametrize("family", FILTERS)
@pytest.mark.parametrize("shape", [(64, 128), (192, 50)])
def test_wavelets_equal_peft(family: str, shape: tuple[int, int]) -> None:
    bands = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows, columns = shape[0] // 2, shape[1] // 2
    details = (bands[:rows, columns:], bands[rows:, :columns], bands[rows:, columns:])
    expected = waverec2d((bands[:rows, :columns], details), family)  # type: ignore[arg-type]
    got = reconstructed(bands, FILTERS[family])
    assert got.shape == expected.shape == (shape[0] - len(FILTERS[family]) + 2, shape[1] - len(FILTERS[family]) + 2)
    assert float((got - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["db1", "db2", "db10", "sym5", "coif1", "coif4"])
def test_wavelet_updates_equal_peft(family: str, tmp_path: Path) -> None:
    sample = SAMPLES["waveft"]
    fields: dict[str, Any] = {"wavelet_family": family, "target_modules": ["k_proj", "down_proj", "o_proj"]}
    assert_as_peft(make_sample(sample, "qwen2", tmp_path, **fields), "qwen2")


def test_a_series_turns_the_other_way_than_the_exact_rotation(tmp_path: Path) -> None:
    directory = make_sample(SAMPLES["oft"], "llama", tmp_path)
    path = "model.layers.0.self_attn.q_proj"
    series = decoded(directory, "llama").forms.changes[path].rotation
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_cayley_neumann": true', '"use_cayley_neumann": false'))
    exact = decoded(directory, "llama").forms.changes[path].rotation
    assert series is not None
    assert exact is not None
    identity = torch.eye(exact.shape[-1]).expand_as(exact)
    assert torch.allclose(exact @ exact.mT, identity, atol=1e-5)
    assert not torch.allclose(series @ series.mT, identity, atol=1e-3)
    assert float((series - exact.mT).abs().max()) < 0.5 * float((series - exact).abs().max())


@pytest.mark.parametrize("name", FORMS)
def test_the_report_says_which_forms_it_becomes(name: str, tmp_path: Path) -> None:
    report = decoded(make_sample(SAMPLES[name], "qwen2", tmp_path), "qwen2").report
    assert set(report.forms) == FORMS[name]
    assert report.num_parameters > 0
    assert len(report.sites) == len({site.path for site in report.sites}) == 21
    assert bool(report.dense_bytes) == bool({"dense", "replacement"} & set(report.forms))


SITE_FORMS = {
    "gain": "gain",
    "shift": "shift",
    "input_gain": "input gain",
    "rotation": "rotation",
    "cos": "turn",
    "dense": "dense",
    "kron_left": "kron",
    "replacement": "replacement",
}


@pytest.mark.parametrize("name", FORMS)
def test_the_report_names_no_form_that_is_not_there(name: str, tmp_path: Path) -> None:
    """The llama has no biases, which some kinds would shift."""
    forms, report = decoded(make_sample(SAMPLES[name], "llama", tmp_path), "llama")
    found = {
        told for field, told in SITE_FORMS.items() for one in forms.changes.values() if getattr(one, field) is not None
    }
    assert set(report.forms) == found | ({"low rank"} if forms.linear else set())


@pytest.mark.parametrize(
    "name", sorted(NEEDS_BASE | {"ia3", "oft", "lokr", "fourierft", "shira", "glora, biases only"})
)
def test_the_report_says_who_needs_the_base(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    report = decoded(make_sample(sample, sample.architectures[0], tmp_path), sample.architectures[0]).report
    is_with_bias = name == "glora, biases only"  # qwen2
    assert report.needs_base == (name in NEEDS_BASE or is_with_bias)
