"""Decoded adapters of AdapterHub compute what the library computed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from peft_core.forms import AdapterForms, KVPrefix
from peft_core.methods import decode
from tests.adapterhub_goldens import BASES, CASES, INDEX, PREFIXES, Golden, golden_model, golden_spec, read_golden
from tests.plain_forms import applied
from tests.tiny_engine import ModelWeights

TOLERANCE = 1e-4  # of logits that spread over 3; nearly all are within 1e-5
WITHOUT_PREFIX = [(base, name) for base, name in CASES if name not in PREFIXES]


def forms_of(golden: Golden) -> AdapterForms:
    config, tensors = golden.files()
    return decode(config, tensors, golden_spec(golden.base), ModelWeights(golden_model(golden.base))).forms


def logits_with(golden: Golden, forms: AdapterForms) -> torch.Tensor:
    """The base with these forms, by hooks, over the golden's tokens."""
    model = golden_model(golden.base)
    ids = torch.tensor([golden.prompt + golden.answer])
    seen = ids.shape[1] + (0 if forms.prefix is None else forms.prefix.num_tokens)
    before = {"use_cache": False} if forms.prefix is None else {"past_key_values": _cache(forms.prefix)}
    with applied(model, forms, golden_spec(golden.base)), torch.inference_mode():
        rows: torch.Tensor = model(
            input_ids=ids,
            attention_mask=torch.ones(1, seen, dtype=torch.long),
            position_ids=torch.arange(ids.shape[1])[None],
            **before,
        ).logits[0, -len(golden.logits) :]
    return rows


def error(golden: Golden, forms: AdapterForms) -> float:
    return float((logits_with(golden, forms) - golden.logits).abs().max())


@pytest.mark.parametrize("base", BASES)
def test_the_bases_themselves_agree(base: str) -> None:
    assert error(read_golden(base, "base"), AdapterForms()) <= TOLERANCE


@pytest.mark.parametrize(("base", "name"), WITHOUT_PREFIX)
def test_logits_and_greedy_tokens_are_the_library_s(base: str, name: str) -> None:
    golden = read_golden(base, name)
    rows = logits_with(golden, forms_of(golden))
    assert float((rows - golden.logits).abs().max()) <= TOLERANCE
    assert rows[-len(golden.answer) - 1 : -1].argmax(-1).tolist() == golden.answer


@pytest.mark.parametrize(("base", "name"), WITHOUT_PREFIX)
def test_every_adapter_matters(base: str, name: str) -> None:
    assert error(read_golden(base, name), AdapterForms()) > 0.1


# Mistral's window is no mask for the library's prefix; the engine's tests cover it.
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # its new name is younger than Veneer's floor
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("name", PREFIXES)
def test_a_prefix_is_the_library_s(base: str, name: str) -> None:
    golden = read_golden(base, name)
    forms = forms_of(golden)
    assert forms.prefix is not None
    assert forms.prefix.first_position == 0
    assert error(golden, forms) <= TOLERANCE


def test_the_goldens_come_from_the_library_s_last_version() -> None:
    assert INDEX["versions"]["adapters"] == "1.3.0"


def _cache(prefix: KVPrefix) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    return cache
