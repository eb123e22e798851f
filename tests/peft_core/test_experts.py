"""Additions to the experts and the routers of mixtures, row by row, against a model with changed weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from peft_core.batch import SlotRows
from peft_core.forms import AdapterForms, ExpertDelta
from peft_core.hooks.experts import deltas_at, experts_hook, router_hook
from peft_core.spec import BaseModelSpec
from tests.tiny_engine import Ask, TinyEngine
from tests.tiny_models import HIDDEN, make_model, random_prompt

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
NUM_ROWS = 40


@functools.cache
def mixture(arch: str) -> PreTrainedModel:
    return make_model(arch, seed=5)


@functools.cache
def mixture_spec(arch: str) -> BaseModelSpec:
    return BaseModelSpec.from_model(mixture(arch), "test")


def is_transposed(arch: str) -> bool:
    return arch == "gpt_oss"


def random_experts(arch: str, *, seed: int, rank: int = 3, only: str = "") -> AdapterForms:
    """An addition to every expert and router weight whose path ends in `only`."""
    random = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, shape in mixture_spec(arch).expert_parameters.items():
        experts = shape[0] if len(shape) == 3 else 1
        rows, columns = shape[-2:] if len(shape) == 2 or not is_transposed(arch) else (shape[2], shape[1])
        down = torch.randn(experts, rank, columns, generator=random) / columns**0.5
        deltas[name] = ExpertDelta(down, torch.randn(experts, rows, rank, generator=random) * 0.5)
    return AdapterForms(experts={name: delta for name, delta in deltas.items() if name.endswith(only)})


def changed_model(arch: str, forms: AdapterForms) -> PreTrainedModel:
    """The plain model with the additions in its weights."""
    model = copy.deepcopy(mixture(arch))
    for name, delta in forms.experts.items():
        weight, change = model.get_parameter(name), delta.up @ delta.down
        if weight.dim() == 2:
            change = change[0]
        elif is_transposed(arch):
            change = change.transpose(1, 2)
        weight.data += change
    return model


@contextmanager
def hooked(arch: str, parts: tuple[SlotRows, ...], forms: Mapping[int, AdapterForms]) -> Iterator[PreTrainedModel]:
    model, handles = mixture(arch), []
    for path in sorted({name.rpartition(".")[0] for one in forms.values() for name in one.experts}):
        module: Any = model.get_submodule(path)
        make = router_hook if f"{path}.weight" in mixture_spec(arch).expert_parameters else experts_hook
        handles.append(module.register_forward_hook(make(module, path, parts, forms), with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def logits(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """[prompts, tokens, vocabulary]; all prompts have one length."""
    with torch.inference_mode():
        result: torch.Tensor = model(torch.tensor(prompts), use_cache=False).logits
        return result


@pytest.mark.parametrize("arch", MIXTURES)
def test_the_spec_lists_stacked_experts_and_routers(arch: str) -> None:
    parameters = mixture_spec(arch).expert_parameters
    assert len(parameters) == 3 * 3
    assert sum(len(shape) == 2 for shape in parameters.values()) == 3
    assert bool(mixture_spec(arch).transposed_experts) == is_transposed(arch)
    assert BaseModelSpec.from_json(mixture_spec(arch).to_json()) == mixture_spec(arch)


def test_experts_that_are_called_otherwise_are_not_listed() -> None:
    model = make_model("mixtral")
    for layer in model.model.layers:
        del layer.mlp.experts.is_transposed
    spec = BaseModelSpec.from_model(model, "test")
    assert not spec.expert_parameters
    assert "model.layers.0.mlp.experts.gate_up_proj" in spec.other_modules


@pytest.mark.parametrize("only", ["", "gate_up_proj", "down_proj", ".weight"])
@pytest.mark.parametrize("arch", MIXTURES)
def test_sequences_of_different_adapters_equal_their_own_models(arch: str, only: str) -> None:
    forms = {0: random_experts(arch, seed=1, only=only), 1: random_experts(arch, seed=2, rank=5)}
    length = 11
    prompts = [random_prompt(length, seed=seed) for seed in range(4)]
    rows = [np.arange(index * length, (index + 1) * length) for index in range(4)]
    parts = (
        SlotRows(0, rows[0], is_narrow=False),
        SlotRows(1, np.concatenate([rows[1][:4], rows[3]]), is_narrow=True),
        SlotRows(1, rows[1][4:], is_narrow=False),
    )
    with hooked(arch, parts, forms) as model:
        got = logits(model, prompts)
    own = [changed_model(arch, forms[0]), changed_model(arch, forms[1]), mixture(arch), changed_model(arch, forms[1])]
    for index, one in enumerate(own):
        assert (got[index] - logits(one, [prompts[index]])[0]).abs().max() <= 1e-4
    plain = logits(mixture(arch), prompts)
    assert torch.equal(got[2], plain[2])  # rows of the base are the base's own
    assert (got[0] - plain[0]).abs().max() > 0.05  # negative control
    assert (got[1] - plain[1]).abs().max() > 0.05


@pytest.mark.parametrize("arch", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company(arch: str, dtype: torch.dtype) -> None:
    module: Any = copy.deepcopy(mixture(arch)).to(dtype).get_submodule("model.layers.1.mlp.experts")
    path = "model.layers.1.mlp.experts"
    forms = {0: random_experts(arch, seed=1, only="gate_up_proj"), 1: random_experts(arch, seed=2, rank=5)}
    random = torch.Generator().manual_seed(3)
    x = torch.randn(NUM_ROWS, HIDDEN, generator=random).to(dtype)
    chosen = torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(NUM_ROWS)])
    weights = torch.rand(NUM_ROWS, 2, generator=random).to(dtype)

    def run(rows: list[int], slots: list[int]) -> torch.Tensor:
        parts = tuple(
            SlotRows(slot, np.flatnonzero(np.array(slots) == slot), is_narrow=True) for slot in sorted(set(slots))
        )
        hook = experts_hook(module, path, parts, forms)
        handle = module.register_forward_hook(hook, with_kwargs=True)
        try:
            with torch.inference_mode():
                result: torch.Tensor = module(x[rows], chosen[rows], weights[rows])
                return result
        finally:
            handle.remove()

    everyone = run(list(range(NUM_ROWS)), [row % 2 for row in range(NUM_ROWS)])
    for row in (0, 1, 2, 17):
        assert torch.equal(run([row], [row % 2])[0], everyone[row])
    some = list(range(5, 24))
    assert torch.equal(run(some, [row % 2 for row in some]), everyone[some])
    assert not torch.equal(run([0], [1])[0], everyone[0])  # negative control


def test_pairs_that_no_expert_takes_add_nothing() -> None:
    arch, path = "mixtral", "model.layers.0.mlp.experts"
    forms = {0: random_experts(arch, seed=1)}
    module: Any = mixture(arch).get_submodule(path)
    part = SlotRows(0, np.arange(3), is_narrow=True)
    handle = module.register_forward_hook(experts_hook(module, path, (part,), forms), with_kwargs=True)
    try:
        x, weights = torch.randn(3, HIDDEN), torch.tensor([[0.5, 0.0]]).expand(3, 2)
        chosen = torch.tensor([[1, 4], [1, 0], [4, 4]])
        with torch.inference_mode():
            got = module(x, top_k_index=chosen, top_k_weights=weights)
            known = module(x, torch.tensor([[1, 0]]).expand(3, 2), weights)
    finally:
        handle.remove()
    assert torch.equal(got[:2], known[:2])
    assert not got[2].any()


def test_only_the_module_s_own_parameters_are_its_deltas() -> None:
    forms = random_experts("mixtral", seed=1)
    assert set(deltas_at(forms, "model.layers.0.mlp.experts")) == {"gate_up_proj", "down_proj"}
    assert set(deltas_at(forms, "model.layers.0.mlp.gate")) == {"weight"}
    assert not deltas_at(forms, "model.layers.0.mlp")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_s_row_has_the_same_bits_in_any_company_of_an_engine(dtype: str, tmp_path: Path) -> None:
    """Also where only the experts are changed: the router sees few rows padded as well."""
    engine = TinyEngine(
        mixture("qwen3_moe"),
        tmp_path,
        dtype=dtype,
        chunk_size=16,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )
    forms = {"both": random_experts("qwen3_moe", seed=1), "experts": random_experts("qwen3_moe", seed=2, only="proj")}
    tickets = {name: engine.add_forms(name, one) for name, one in forms.items()}
    mine = [Ask(name, random_prompt(21, seed=7), ticket) for name, ticket in tickets.items()]
    alone = {ask.name: engine.run([ask])[ask.name] for ask in mine}
    owners = [None, *tickets.values()]
    crowd = [Ask(f"n{index}", random_prompt(3 + 5 * index, seed=index), owners[index % 3]) for index in range(8)]
    answers = engine.run([*crowd, *mine], stagger_steps=1)
    for name in forms:
        assert answers[name].tokens == alone[name].tokens
        assert np.array_equal(answers[name].logprobs, alone[name].logprobs)
    assert not np.array_equal(alone["both"].logprobs, alone["experts"].logprobs)
