"""What is wrong with the tensors of an adapter is refused by name, the same way for every kind."""

from __future__ import annotations

import pytest
import torch

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from tests.peft_core.spoilt import ONE_A_KIND, flat, module_of, one_of_each, spoilt

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


@pytest.mark.parametrize("name", ONE_A_KIND)
class TestEveryKind:
    def test_is_served_as_it_is(self, name: str) -> None:
        assert spoilt(name).decode().report.irrelevant_fields

    def test_every_tensor_is_used(self, name: str) -> None:
        """Another value anywhere makes other forms: nothing is read and dropped."""
        adapter = spoilt(name)
        report = adapter.check()
        before = flat(adapter.decode().forms)
        tried: set[str] = set()
        for tensor, values in adapter.tensors.items():
            ending = tensor.rpartition("layers.0.")[2]
            if tensor in report.irrelevant_tensors or ending in tried or not values.is_floating_point():
                continue
            tried.add(ending)
            other = spoilt(name)
            other.tensors[tensor] = values + 0.25
            if tensor.endswith(".zeros"):  # of GLoRA: values that must be 0
                assert "not 0" in str(other.refusal_of_values())
                continue
            after = flat(other.decode().forms)
            assert any(not torch.equal(before[key], after[key]) for key in before), tensor

    def test_without_a_tensor(self, name: str) -> None:
        adapter = spoilt(name)
        path = adapter.first().rpartition("layers.0.")[0]
        per_module = [tensor for tensor in adapter.tensors if tensor.startswith(f"{path}layers.0.")]
        module = module_of(per_module[0])
        own = [tensor for tensor in per_module if module_of(tensor) == module]
        own = [tensor for tensor in own if tensor not in adapter.check().irrelevant_tensors]
        for tensor in own if len(own) > 1 else ():
            other = spoilt(name)
            del other.tensors[tensor]
            error = other.refusal()
            assert isinstance(error, MalformedAdapter), tensor
            assert "missing" in str(error)

    def test_with_an_unknown_tensor(self, name: str) -> None:
        adapter = spoilt(name)
        extra = f"{module_of(adapter.first())}.surprise"
        adapter.tensors[extra] = torch.ones(3)
        error = adapter.refusal()
        assert error.tensor == extra
        assert isinstance(error, UnsupportedAdapter | BaseMismatch)

    def test_with_an_unknown_shared_tensor(self, name: str) -> None:
        adapter = spoilt(name)
        adapter.tensors["base_model.surprise"] = torch.ones(3)
        assert adapter.refusal().tensor == "base_model.surprise"

    def test_of_another_size(self, name: str) -> None:
        for tensor in one_of_each(spoilt(name)):
            if tensor == "base_model.randlora_B":  # may be larger than what these modules need
                continue
            adapter = spoilt(name)
            adapter.tensors[tensor] = torch.cat([adapter.tensors[tensor]] * 3).contiguous()
            error = adapter.refusal()
            assert isinstance(error, BaseMismatch | MalformedAdapter), tensor

    def test_of_another_dimension(self, name: str) -> None:
        for tensor in one_of_each(spoilt(name)):
            adapter = spoilt(name)
            adapter.tensors[tensor] = adapter.tensors[tensor][None].contiguous()
            assert isinstance(adapter.refusal(), BaseMismatch | MalformedAdapter), tensor

    def test_empty(self, name: str) -> None:
        for tensor in one_of_each(spoilt(name)):
            adapter = spoilt(name)
            adapter.tensors[tensor] = adapter.tensors[tensor][:0].contiguous()
            assert isinstance(adapter.refusal(), BaseMismatch | MalformedAdapter), tensor

    def test_of_a_wrong_type(self, name: str) -> None:
        for tensor in one_of_each(spoilt(name)):
            adapter = spoilt(name)
            values = adapter.tensors[tensor]
            adapter.tensors[tensor] = values.to(torch.int64) if values.is_floating_point() else values.double()
            error = adapter.refusal()
            assert isinstance(error, MalformedAdapter), tensor
            assert error.tensor == tensor

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_with_a_value_that_is_no_number(self, name: str, value: float) -> None:
        adapter = spoilt(name)
        tensor = next(iter(one_of_each(adapter)))
        adapter.tensors[tensor] = adapter.tensors[tensor].clone()
        adapter.tensors[tensor].view(-1)[0] = value
        error = adapter.refusal_of_values()
        assert isinstance(error, MalformedAdapter)
        assert error.tensor == tensor

    def test_with_an_unknown_field(self, name: str) -> None:
        adapter = spoilt(name)
        adapter.config["surprise"] = 3
        assert adapter.refusal().field == "surprise"

    def test_of_a_module_that_is_not_targeted(self, name: str) -> None:
        adapter = spoilt(name)
        adapter.config["target_modules"] = ["post_attention_layernorm"] if name == "norms" else ["gate_proj"]
        error = adapter.refusal()
        assert "does not target" in str(error)

    def test_of_a_module_that_the_base_lacks(self, name: str) -> None:
        adapter = spoilt(name)
        moved = {key.replace("layers.0.", "layers.9."): value for key, value in adapter.tensors.items()}
        adapter.tensors = moved
        assert isinstance(adapter.refusal(), BaseMismatch)

    def test_without_any_tensor(self, name: str) -> None:
        adapter = spoilt(name)
        adapter.tensors = {}
        assert isinstance(adapter.refusal(), MalformedAdapter | UnsupportedAdapter)

    def test_with_a_missing_module(self, name: str) -> None:
        """Left as in the base, and told; refused where PEFT would make it random."""
        adapter = spoilt(name)
        module = module_of(adapter.first())
        adapter.tensors = {key: value for key, value in adapter.tensors.items() if module_of(key) != module}
        random_field = {"ia3": "init_ia3_weights", "norms": ""}.get(name, "init_weights")
        if random_field:
            adapter.config[random_field] = False
            assert adapter.refusal().field == "target_modules"
            adapter.config[random_field] = True
        assert any("no tensors" in warning for warning in adapter.check().warnings)


@pytest.mark.parametrize("name", ["oft", "boft", "beft", "road_1", "lokr", "c3a", "shira", "supertuning", "glora"])
def test_kinds_that_peft_does_not_make_on_conv1d(name: str) -> None:
    adapter = spoilt(name)
    adapter.config |= {"target_modules": ["c_attn"], "init_weights": True}
    adapter.arch = "gpt2"
    rename = "model.layers.0.self_attn.q_proj"
    adapter.tensors = {
        key.replace(rename, "transformer.h.0.attn.c_attn"): value
        for key, value in adapter.tensors.items()
        if rename in key
    }
    error = adapter.refusal()
    assert isinstance(error, UnsupportedAdapter)
    assert "Conv1D" in str(error)
