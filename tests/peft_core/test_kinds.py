"""Each kind of adapter that is not served is refused with a sentence of its own."""

from __future__ import annotations

from typing import Any

import pytest
from peft import PeftType

from peft_core.errors import AdapterError, MalformedAdapter, UnsupportedAdapter
from peft_core.methods import SERVED_KINDS, check
from peft_core.methods.kinds import REFUSED_KINDS
from tests.peft_core.adapter_files import shared_spec


def refusal_of(config: dict[str, Any]) -> UnsupportedAdapter:
    with pytest.raises(UnsupportedAdapter) as refusal:
        check(config, {}, shared_spec("llama"))
    return refusal.value


def test_every_kind_of_peft_is_served_or_has_its_sentence() -> None:
    kinds = {kind.value for kind in PeftType}
    assert len(kinds) > 40
    assert kinds - {*SERVED_KINDS} <= REFUSED_KINDS
    assert not REFUSED_KINDS & {*SERVED_KINDS}
    assert "NEW_KIND" not in REFUSED_KINDS


@pytest.mark.parametrize("kind", sorted(REFUSED_KINDS))
def test_a_kind_that_is_not_served_is_refused_by_its_own_name(kind: str) -> None:
    error = refusal_of({"peft_type": kind, "r": 8})
    assert error.code == "unsupported_peft_type"
    assert (error.field, error.value) == ("peft_type", f'"{kind}"')
    assert "is not served" in str(error)
    assert "unknown" not in str(error)


def test_sentences_say_what_the_kind_is() -> None:
    assert "adaption prompts (LLaMA-Adapter) is not served yet" in str(refusal_of({"peft_type": "ADAPTION_PROMPT"}))
    assert "batch" in str(refusal_of({"peft_type": "LILY"}))


@pytest.mark.parametrize("kind", ["NEW_KIND", "lora", "LoRA"])
def test_an_unknown_kind_is_refused_by_name(kind: str) -> None:
    error = refusal_of({"peft_type": kind})
    assert kind in str(error)
    assert "unknown" in str(error)


@pytest.mark.parametrize("config", [{}, {"peft_type": None}, {"peft_type": ""}, {"peft_type": 3}, {"r": 8}])
def test_a_config_without_a_kind_is_malformed(config: dict[str, Any]) -> None:
    with pytest.raises(MalformedAdapter, match="peft_type") as refusal:
        check(config, {}, shared_spec("llama"))
    assert refusal.value.field == "peft_type"


def test_other_libraries_with_the_same_file_name_are_recognised() -> None:
    hub = {"config": {"architecture": "lora"}, "model_type": "llama", "version": "adapters.1.3.0", "name": "sql"}
    with pytest.raises(MalformedAdapter, match=r"adapters\.sql\.adapter_up"):  # its decoder misses its tensors
        check(hub, {}, shared_spec("llama"))
    mlx = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}
    assert "MLX" in str(refusal_of(mlx))
    with pytest.raises(AdapterError) as refusal:
        check({"peft_type": "LOHA", **hub}, {}, shared_spec("llama"))
    assert "adapter_up" not in str(refusal.value)
