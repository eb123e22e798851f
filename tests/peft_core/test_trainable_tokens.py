"""Rows of single tokens: new values in the order of the config, in the embedding, and in a head of the same weight."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model

from peft_core.errors import AdapterError, BaseMismatch, MalformedAdapter, UnsupportedAdapter
from tests.peft_core.adapter_files import load_adapter, logits_of, write_adapter
from tests.peft_core.lora_samples import (
    PROMPT,
    assert_equals_peft,
    decoded,
    error_against_peft,
    given,
    spec_of,
    tiny_base,
)
from tests.plain_forms import applied
from tests.tiny_models import attention_targets, load_oracle, make_lora

PREFIX = "base_model.model."
IDS = [PROMPT[5], 250, PROMPT[0], 3]  # not in order, two of them in the prompt
TABLES = {"gpt2": "transformer.wte"}


def table(arch: str) -> str:
    return TABLES.get(arch, "model.embed_tokens")


def make_tokens(model: Any, directory: Path, **fields: Any) -> Path:
    """Trainable tokens without LoRA."""
    return save_random(
        model, TrainableTokensConfig(**{"token_indices": IDS, "task_type": "CAUSAL_LM", **fields}), directory
    )


def save_random(model: Any, config: Any, directory: Path, **options: Any) -> Path:
    """What PEFT saves after a training that moved every trained value at random."""
    generator = torch.Generator().manual_seed(9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(str(directory), **options)
    return directory


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_trainable_tokens_equal_peft(arch: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_base(arch, tie_word_embeddings=tied)
    directory = make_tokens(model, tmp_path)
    forms, report = assert_equals_peft(model, directory)
    assert report.kind == "TRAINABLE_TOKENS"
    assert set(report.forms) == ({"embedding", "head rows"} if tied else {"embedding"})
    assert not report.needs_base
    assert forms.embeddings[table(arch)].token_ids == tuple(IDS)
    assert bool(forms.head_rows) == tied
    if tied:
        assert error_against_peft(model, directory, replace(forms, head_rows={})) > 0.01


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("named", [False, True], ids=["list", "object"])
def test_tokens_beside_a_lora_equal_peft(arch: str, tied: bool, named: bool, tmp_path: Path) -> None:
    """One tensor is stored, and acts in the head as well where the head has the same weight."""
    model = tiny_base(arch, tie_word_embeddings=tied)
    indices = {table(arch).rpartition(".")[2]: IDS} if named else IDS
    directory = make_lora(model, tmp_path / "a", targets=attention_targets(arch), trainable_token_indices=indices)
    stored = [name for name in load_adapter(directory)[1] if "trainable_tokens" in name]
    assert len(stored) == 1
    forms, _ = assert_equals_peft(model, directory)
    assert bool(forms.head_rows) == tied
    config, tensors = load_adapter(directory)
    shuffled = {table(arch).rpartition(".")[2]: IDS[::-1]} if named else IDS[::-1]
    other = write_adapter(tmp_path / "b", {**config, "trainable_token_indices": shuffled}, tensors)
    assert error_against_peft(model, directory, decoded(model, other).forms) > 0.01
    embedding = forms.embeddings[table(arch)]
    own = model.get_submodule(table(arch)).weight.detach()[list(embedding.token_ids)]
    as_differences = replace(embedding, rows=own + embedding.rows)
    assert error_against_peft(model, directory, replace(forms, embeddings={table(arch): as_differences})) > 0.01


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("head_ids", [[7, 9], IDS], ids=["other tokens", "the same tokens"])
def test_tokens_of_embedding_and_head_equal_peft(head_ids: list[int], tied: bool, tmp_path: Path) -> None:
    model = tiny_base("llama", tie_word_embeddings=tied)
    indices = {"embed_tokens": IDS, "lm_head": head_ids}
    directory = make_lora(model, tmp_path, targets=["q_proj"], trainable_token_indices=indices)
    forms, _ = assert_equals_peft(model, directory)
    assert forms.head_rows["lm_head"].token_ids == tuple(head_ids)


def test_tokens_beside_a_lora_on_the_tied_head_equal_peft(tmp_path: Path) -> None:
    """A replaced row of the head gets the low-rank addition as well."""
    model = tiny_base("llama", tied=True)
    directory = make_lora(model, tmp_path / "a", targets=["q_proj", "lm_head"], trainable_token_indices=IDS)
    assert_equals_peft(model, directory)
    config, tensors = load_adapter(directory)
    tensors[f"{PREFIX}lm_head.lora_magnitude_vector"] = torch.ones(256)
    for layer in range(3):
        tensors[f"{PREFIX}model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(64)
    with pytest.raises(UnsupportedAdapter, match="single rows are replaced as well"):
        decoded(model, write_adapter(tmp_path / "b", config | {"use_dora": True}, tensors))


@pytest.mark.parametrize("kind", ["LORA", "TRAINABLE_TOKENS"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_saved_with_their_tables_equal_peft(kind: str, tied: bool, tmp_path: Path) -> None:
    """As PEFT saves them with save_embedding_layers: tables and rows, twice where embedding and head are one weight."""
    model = tiny_base("llama", tied=tied)
    ids = [3, 257, PROMPT[2], 256]
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(258, mean_resizing=False)
    if kind == "LORA":
        config: Any = LoraConfig(target_modules=["q_proj"], trainable_token_indices=ids, task_type="CAUSAL_LM")
    else:
        config = TrainableTokensConfig(token_indices=ids, task_type="CAUSAL_LM")
    directory = save_random(resized, config, tmp_path / "a", save_embedding_layers=True)
    if kind == "TRAINABLE_TOKENS" and not tied:
        with pytest.raises(BaseMismatch, match="one side only"):  # PEFT leaves the head out
            decoded(model, directory)
        return
    forms, report = decoded(model, directory)
    assert report.kind == kind
    assert forms.vocab_size == 258
    prompt = [*PROMPT, 256, 257, 3]
    expected = logits_of(load_oracle(resized, directory), prompt)
    with applied(resized, forms, spec_of(model)) as adapted:
        assert float((logits_of(adapted, prompt) - expected).abs().max()) < 2e-5


def lora_with_tokens(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return load_adapter(make_lora(tiny_base("llama"), directory, targets=["q_proj"], trainable_token_indices=[3, 5]))


@pytest.mark.parametrize(
    ("indices", "error", "sentence"),
    [
        ([3, 5, 7], MalformedAdapter, "2 rows, but field"),
        ({"embed_tokens": [3, 5], "lm_head": [7]}, MalformedAdapter, "no rows for them"),
        (None, UnsupportedAdapter, "lists none"),
        ({"wte": [3, 5]}, UnsupportedAdapter, "lists none"),
        ([3, 256], BaseMismatch, "save_embedding_layers=True"),
        ([3, 3], MalformedAdapter, "different token ids"),
        ([3, -1], MalformedAdapter, "different token ids"),
        ([3, True], MalformedAdapter, "different token ids"),
        ("embed_tokens", MalformedAdapter, "different token ids"),
    ],
    ids=str,
)
def test_tokens_and_rows_must_fit(indices: object, error: type[AdapterError], sentence: str, tmp_path: Path) -> None:
    config, tensors = lora_with_tokens(tmp_path / "a")
    other = write_adapter(tmp_path / "b", {**config, "trainable_token_indices": indices}, tensors)
    with pytest.raises(error) as refusal:
        decoded(tiny_base("llama"), other)
    assert sentence in str(refusal.value)


def test_rows_of_another_width_are_a_mismatch(tmp_path: Path) -> None:
    config, tensors = lora_with_tokens(tmp_path / "a")
    name = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    with pytest.raises(BaseMismatch, match="rows of width 64"):
        decoded(tiny_base("llama"), write_adapter(tmp_path / "b", config, tensors | {name: torch.ones(2, 32)}))
    moved = {key.replace("embed_tokens", "layers.0.mlp.up_proj"): value for key, value in tensors.items()}
    with pytest.raises(BaseMismatch, match="no embedding and no head"):
        decoded(tiny_base("llama"), write_adapter(tmp_path / "c", config, moved))


def test_a_table_replaced_as_a_whole_has_no_single_rows(tmp_path: Path) -> None:
    config, tensors = lora_with_tokens(tmp_path / "a")
    tensors[f"{PREFIX}model.embed_tokens.weight"] = torch.ones(256, 64)
    config["modules_to_save"] = ["embed_tokens"]
    with pytest.raises(UnsupportedAdapter, match="PEFT does not serve both"):
        decoded(tiny_base("llama"), write_adapter(tmp_path / "b", config, tensors))


def test_new_tokens_of_a_larger_vocabulary(tmp_path: Path) -> None:
    """The larger table is stored beside the rows."""
    config, tensors = lora_with_tokens(tmp_path / "a")
    generator = torch.Generator().manual_seed(2)
    embedding = torch.randn(258, 64, generator=generator)
    tensors[f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight"] = embedding
    tensors[f"{PREFIX}lm_head.weight"] = torch.randn(258, 64, generator=generator)
    larger = write_adapter(tmp_path / "b", {**config, "trainable_token_indices": [256, 257]}, tensors)
    forms = decoded(tiny_base("llama"), larger).forms
    assert forms.vocab_size == 258
    change = forms.embeddings["model.embed_tokens"]
    assert change.token_ids == ()
    assert torch.equal(given(change.replacement)[:256], embedding[:256])
    rows = tensors[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert torch.equal(given(change.replacement)[256:], rows)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_of_which_only_the_rows_are_stored_equal_peft(tied: bool, tmp_path: Path) -> None:
    """PEFT loads them into a base that was made larger; what stood in its new rows does not matter."""
    model = tiny_base("llama", tied=tied)
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(258, mean_resizing=False)
    tokens: Any = [257, PROMPT[3], 256] if tied else {"embed_tokens": [257, PROMPT[3], 256], "lm_head": [256, 257]}
    options: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    directory = save_random(resized, LoraConfig(trainable_token_indices=tokens, **options), tmp_path / "a")
    forms, report = decoded(model, directory)
    assert (forms.vocab_size, report.needs_base) == (258, True)
    prompt = [*PROMPT, 256, 257, 3]
    expected = logits_of(load_oracle(resized, directory), prompt)
    with applied(resized, forms, spec_of(model)) as adapted:
        assert float((logits_of(adapted, prompt) - expected).abs().max()) < 2e-5
    with pytest.raises(UnsupportedAdapter, match="only the new rows"):
        decoded(model, directory, with_base=False)
    gap: Any = [255, PROMPT[3], 257]
    unknown = save_random(resized, LoraConfig(trainable_token_indices=gap, **options), tmp_path / "b")
    with pytest.raises(BaseMismatch, match="save_embedding_layers=True"):
        decoded(model, unknown)


def test_a_head_with_a_bias_keeps_its_rows(tmp_path: Path) -> None:
    """PEFT leaves the bias out as soon as rows of such a head are replaced; that is nobody's intention."""
    model = copy.deepcopy(tiny_base("llama"))
    model.lm_head.bias = torch.nn.Parameter(torch.ones(256))
    saved = make_lora(tiny_base("llama"), tmp_path, targets=["q_proj"], trainable_token_indices={"lm_head": [3]})
    with pytest.raises(UnsupportedAdapter, match="a head with a bias"):
        decoded(model, saved)


@pytest.mark.parametrize("fields", [{"token_indices": []}, {"token_indices": None}])
def test_trainable_tokens_without_tokens_do_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    config, tensors = load_adapter(make_tokens(tiny_base("llama"), tmp_path / "a"))
    with pytest.raises(MalformedAdapter, match="would do nothing"):
        decoded(tiny_base("llama"), write_adapter(tmp_path / "b", config | fields, tensors))
    with pytest.raises(UnsupportedAdapter, match="rotate"):
        decoded(tiny_base("llama"), write_adapter(tmp_path / "c", config | {"rotate": 3}, tensors))


def test_trainable_tokens_have_one_list_of_tokens(tmp_path: Path) -> None:
    """The field of the other kinds would say something else than the own one."""
    config, tensors = load_adapter(make_tokens(tiny_base("llama"), tmp_path / "a"))
    doubled = write_adapter(tmp_path / "b", config | {"trainable_token_indices": [1]}, tensors)
    with pytest.raises(UnsupportedAdapter, match="Say them there") as refusal:
        decoded(tiny_base("llama"), doubled)
    assert refusal.value.field == "trainable_token_indices"


def test_a_norm_replaced_beside_trainable_tokens_counts(tmp_path: Path) -> None:
    config, tensors = load_adapter(make_tokens(tiny_base("llama"), tmp_path / "a"))
    with_norm = tensors | {f"{PREFIX}model.norm.weight": torch.ones(64)}
    reports = [
        decoded(tiny_base("llama"), write_adapter(tmp_path / name, config, stored)).report
        for name, stored in (("b", tensors), ("c", with_norm))
    ]
    assert [report.num_parameters for report in reports] == [len(IDS) * 64, len(IDS) * 64 + 64]
    assert reports[1].forms == ("norm", "embedding")


def test_trainable_tokens_of_another_table(tmp_path: Path) -> None:
    model = tiny_base("llama")
    directory = make_tokens(model, tmp_path / "a", target_modules=["lm_head", "embed_tokens"])
    forms, _ = assert_equals_peft(model, directory)
    assert forms.head_rows["lm_head"].token_ids == tuple(IDS)
    config, tensors = load_adapter(directory)
    fewer = write_adapter(tmp_path / "b", config | {"target_modules": ["embed_tokens"]}, tensors)
    with pytest.raises(UnsupportedAdapter, match="PEFT would drop"):
        decoded(model, fewer)
