"""The container around AdapterHub's adapters: versions, heads, reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_core.errors import AdapterError, MalformedAdapter, UnsupportedAdapter
from peft_core.methods import decode
from peft_core.methods.kinds import ADAPTERHUB, kind_of
from tests.adapterhub_goldens import CASES, DIRECTORY, golden_model, golden_spec, read_golden
from tests.peft_core.test_adapterhub_parity import TOLERANCE, error, forms_of
from tests.peft_core.test_adapterhub_refusals import Spoilt
from tests.tiny_engine import ModelWeights


def test_the_container_is_told_by_its_keys_not_by_its_name() -> None:
    config, _ = read_golden("llama", "seq_bn").files()
    assert kind_of(config) == ADAPTERHUB
    assert kind_of({key: value for key, value in config.items() if key != "version"}) == ADAPTERHUB
    assert kind_of({**config, "peft_type": "LORA"}) == "LORA"
    with pytest.raises(MalformedAdapter):
        kind_of({"version": "adapters.1.3.0"})


@pytest.mark.parametrize(("base", "name"), CASES)
def test_reports_speak_of_every_site_in_the_base_s_order(base: str, name: str) -> None:
    report = Spoilt(base, name).check()
    spec = golden_spec(base)
    order = [*spec.sites, *spec.blocks]
    paths = [site.path for site in report.sites]
    assert report.kind == ADAPTERHUB
    assert paths == sorted(paths, key=order.index)
    assert report.num_parameters > 0
    forms = forms_of(read_golden(base, name))
    assert set(paths) == {*forms.linear, *forms.changes}
    assert ("prefix" in report.forms) == (forms.prefix is not None)
    assert ("bottleneck" in report.forms) == bool(forms.bottlenecks)
    assert ("gain" in report.forms) == bool(forms.changes)
    assert all(field.startswith(("config.", "model_class")) for field in report.irrelevant_fields)


@pytest.mark.parametrize(
    ("base", "name", "needs"),
    [("llama", "seq_bn", False), ("gemma2", "seq_bn", True), ("gemma2", "par_bn", False), ("llama", "dora", True)],
)
def test_the_base_s_weights_are_read_only_where_they_count(base: str, name: str, needs: bool) -> None:
    spoilt = Spoilt(base, name)
    assert spoilt.check().needs_base == needs
    _, tensors = read_golden(base, name).files()
    if not needs:
        decode(spoilt.config, tensors, golden_spec(base), None)
        return
    with pytest.raises(UnsupportedAdapter) as refusal:
        decode(spoilt.config, tensors, golden_spec(base), None)
    assert refusal.value.code == "base_weights_needed"


def test_copies_of_a_prefix_are_told_and_not_counted() -> None:
    report = Spoilt("llama", "mam").check()
    assert len(report.irrelevant_tensors) == 3 * 5
    assert report.num_parameters == 5 * 32 + (8 * 32 + 8) + (96 * 8 + 96) + 3 * (2 * 4 * 32 + 4 + 32)


class TestVersions:
    @pytest.mark.parametrize(
        ("version", "scaling"),
        [
            ("adapters.1.0.1", 1.0),
            ("adapters.0.2.2", 1.0),
            ("adapters.1.1.0.dev0", 1.0),
            ("adapters.1.1.0", 3.0),
            ("adapters.1.2", 3.0),
            ("adapters.2.0.0", 3.0),
            ("3.2.1", 3.0),
        ],
    )
    def test_lora_had_scaling_1_before_1_1(self, version: str, scaling: float) -> None:
        spoilt = Spoilt("llama", "lora")
        spoilt.config["version"] = version
        report = spoilt.check()
        assert {site.scaling for site in report.sites} == {scaling}
        assert any("scaling 1" in sentence for sentence in report.warnings) == (scaling == 1.0)

    def test_the_scaling_that_the_library_would_use_is_another_adapter(self) -> None:
        spoilt = Spoilt("llama", "lora")
        spoilt.config["version"] = "adapters.1.0.1"
        assert error(read_golden("llama", "lora"), spoilt.decode().forms) > 100 * TOLERANCE

    @pytest.mark.parametrize(
        ("said", "meant"), [("gelu", "gelu_new"), ("gelu_orig", "gelu"), ("relu", "relu"), ("gelu_new", "gelu_new")]
    )
    def test_activations_were_called_otherwise_before_there_were_versions(self, said: str, meant: str) -> None:
        spoilt = Spoilt("llama", "seq_bn").set(non_linearity=said)
        del spoilt.config["version"]
        assert {one.activation for one in spoilt.decode().forms.bottlenecks.values()} == {meant}

    def test_today_s_names_mean_what_they_say(self) -> None:
        spoilt = Spoilt("llama", "seq_bn").set(non_linearity="gelu")
        assert {one.activation for one in spoilt.decode().forms.bottlenecks.values()} == {"gelu"}

    @pytest.mark.parametrize("version", ["adapters.next", 3, ["adapters.1.3.0"]])
    def test_a_version_that_is_none_is_malformed(self, version: object) -> None:
        spoilt = Spoilt("llama", "lora")
        spoilt.config["version"] = version
        assert spoilt.refusal(MalformedAdapter).field == "version"


class TestHeads:
    def head(self, base: str) -> torch.Tensor:
        return ModelWeights(golden_model(base)).weight("lm_head").clone()

    def with_head(self, base: str, weight: torch.Tensor) -> Any:
        spoilt = Spoilt(base, "seq_bn")
        spoilt.tensors["lm_head.weight"] = weight
        return spoilt

    @pytest.mark.parametrize("base", ["llama", "gpt2"])
    def test_the_base_s_own_head_changes_nothing(self, base: str) -> None:
        spoilt = self.with_head(base, self.head(base))
        assert spoilt.check().needs_base
        assert "head" in spoilt.check().warnings[-1]
        assert not spoilt.decode().forms.changes

    def test_the_base_s_own_head_in_fewer_bits_changes_nothing(self) -> None:
        assert not self.with_head("llama", self.head("llama").bfloat16()).decode().forms.changes

    def test_the_head_that_the_library_writes_by_default_is_the_base_s(self) -> None:
        weight = torch.load(DIRECTORY / "as_written" / "pytorch_model_head.bin", weights_only=True)["lm_head.weight"]
        assert not self.with_head("qwen2", weight).decode().forms.changes

    def test_a_trained_head_replaces_the_base_s(self) -> None:
        weight = self.head("llama")
        weight[3] += 1
        change = self.with_head("llama", weight).decode().forms.changes["lm_head"]
        assert torch.equal(change.replacement, weight)

    def test_a_trained_head_that_is_tied_is_refused(self) -> None:
        spoilt = self.with_head("gpt2", self.head("gpt2") + 1)
        spoilt.check()
        with pytest.raises(UnsupportedAdapter, match="tied"):
            spoilt.decode()

    def test_a_head_of_another_size_or_with_a_bias_is_refused(self) -> None:
        assert self.with_head("llama", self.head("llama")[:200]).refusal(AdapterError).tensor == "lm_head.weight"
        spoilt = self.with_head("llama", self.head("llama"))
        spoilt.tensors["lm_head.bias"] = torch.zeros(256)
        assert spoilt.refusal().tensor == "lm_head.bias"


def test_what_the_library_writes_is_what_the_goldens_hold() -> None:
    """Names and values of the pickle, which only stands in another file."""
    written = torch.load(DIRECTORY / "as_written" / "pytorch_adapter.bin", weights_only=True)
    _, tensors = read_golden("qwen2", "seq_bn").files()
    assert written.keys() == tensors.tensors.keys()
    assert all(torch.equal(value, tensors.tensors[name]) for name, value in written.items())
