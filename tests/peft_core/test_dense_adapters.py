"""Kinds that become whole matrices: their limit, the base that some need, and the places of single entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_core.errors import MalformedAdapter, UnsupportedAdapter
from peft_core.methods import decode
from peft_core.methods.whole_matrix.dense import FLAG, MAX_DENSE_BYTES
from tests.peft_core.adapter_files import LoadedTensors, shared_model, shared_spec
from tests.peft_core.spoilt import module_of, spoilt
from tests.peft_core.tuner_samples import ModelWeights

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


class TestWholeMatrices:
    def test_above_the_limit_are_refused_with_their_bytes(self) -> None:
        adapter = spoilt("fourierft")
        size = adapter.check().dense_bytes
        linears = [site for site in shared_spec("llama").sites.values() if site.kind == "linear"]
        assert size == 4 * sum(site.in_features * site.out_features for site in linears)
        with pytest.raises(UnsupportedAdapter) as refusal:
            adapter.check(max_dense_bytes=size - 1)
        assert str(size) in str(refusal.value)
        assert str(size - 1) in str(refusal.value)
        assert FLAG in str(refusal.value)
        assert refusal.value.code == "dense_adapter_too_large"
        assert adapter.check(max_dense_bytes=size).dense_bytes == size

    def test_are_never_read_above_the_limit(self) -> None:
        adapter = spoilt("waveft")
        source = LoadedTensors({name: values.to("meta") for name, values in adapter.tensors.items()})
        with pytest.raises(UnsupportedAdapter, match="max-dense"):
            decode(adapter.config, source, shared_spec("llama"), max_dense_bytes=1)

    def test_are_told_with_their_cost(self) -> None:
        report = spoilt("c3a").check()
        assert any(f"{report.dense_bytes} bytes" in warning for warning in report.warnings)
        assert report.to_json()["dense_bytes"] == report.dense_bytes <= MAX_DENSE_BYTES

    def test_smaller_forms_have_no_limit(self) -> None:
        for name in ("ia3", "oft", "boft", "road_1", "lokr", "beft", "glora, vectors"):
            assert spoilt(name).check(max_dense_bytes=0).dense_bytes == 0


@pytest.mark.parametrize("name", ["hira", "glora", "frod", "supertuning, chosen again"])
def test_kinds_that_need_the_base_say_so(name: str) -> None:
    adapter = spoilt(name)
    assert adapter.check().needs_base
    with pytest.raises(UnsupportedAdapter) as refusal:
        decode(adapter.config, LoadedTensors(adapter.tensors), shared_spec("llama"))
    assert refusal.value.code == "base_weights_needed"


class TestPlacesOfEntries:
    @pytest.mark.parametrize("place", [-1, 10**6])
    @pytest.mark.parametrize("name", ["shira", "supertuning", "frod"])
    def test_outside_the_matrix(self, name: str, place: int) -> None:
        adapter = spoilt(name)
        tensor = next(key for key in adapter.tensors if "_indices" in key)
        adapter.tensors[tensor] = adapter.tensors[tensor].clone()
        adapter.tensors[tensor].view(-1)[0] = place
        error = adapter.refusal_of_values()
        assert isinstance(error, MalformedAdapter)
        assert error.tensor == tensor

    def test_written_on_windows_are_floats(self) -> None:
        adapter, plain = spoilt("shira"), spoilt("shira").decode().forms
        adapter.tensors = {key: value.float() for key, value in adapter.tensors.items()}
        assert torch.equal(first_dense(adapter.decode().forms), first_dense(plain))
        tensor = adapter.first("_indices")
        adapter.tensors[tensor] = adapter.tensors[tensor] + 0.5
        assert "whole" in str(adapter.refusal_of_values())

    def test_twice_are_added(self) -> None:
        adapter = spoilt("shira")
        tensor = adapter.first("_indices")
        adapter.tensors[tensor] = torch.zeros_like(adapter.tensors[tensor])
        values = adapter.tensors[tensor.replace("_indices", "_weight")]
        path = module_of(tensor).removeprefix("base_model.model.")
        dense = adapter.decode().forms.changes[path].dense
        assert float(dense[0, 0]) == pytest.approx(float(values.sum()), abs=1e-5)
        assert int((dense != 0).sum()) == 1

    def test_chosen_again_among_equal_weights_are_not_known(self) -> None:
        adapter = spoilt("supertuning, chosen again")

        class Rounded(ModelWeights):
            def weight(self, path: str) -> torch.Tensor:
                return super().weight(path).round()

        with pytest.raises(UnsupportedAdapter) as refusal:
            decode(
                adapter.config,
                LoadedTensors(adapter.tensors),
                shared_spec("llama"),
                Rounded(shared_model("llama")),
            )
        assert refusal.value.field == "save_precomputed_indices"

    def test_of_another_size_than_the_matrix(self) -> None:
        adapter = spoilt("frod")
        tensor = next(key for key in adapter.tensors if "frod_s_size" in key)
        adapter.tensors[tensor] = adapter.tensors[tensor] - 1
        assert adapter.refusal_of_values().tensor == tensor


def first_dense(forms: Any) -> torch.Tensor:
    dense: torch.Tensor = next(change.dense for change in forms.changes.values())
    return dense
