"""Adapters with more tokens than the base: their rows see them, the rows beside them do not."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from server.engine.request import EngineRequest, SamplingParams
from tests.engine.sampling import Desk, Row, oracle_token, params
from tests.tiny_engine import Ask, TinyEngine, assert_equals_oracle
from tests.tiny_models import VOCAB, make_model, random_prompt

NARROW, WIDE = 300, 340

ASKED = [
    params(),
    params(temperature=0.8, seed=3),
    params(temperature=1.1, top_k=NARROW, seed=4),
    params(temperature=0.9, top_p=0.9, min_p=0.01, seed=5),
    params(temperature=1.0, typical_p=0.8, seed=6),
    params(num_logprobs=7),
    params(temperature=0.7, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2, seed=7),
    params(logit_bias=((5, 3.0), (7, -2.0)), min_new_tokens=3),
]


def padded_logits(widths: list[int], seed: int = 0) -> torch.Tensor:
    """Random, minus infinity beyond each row's own vocabulary: what the model gives in a step of mixed widths."""
    logits = 3 * torch.randn((len(widths), max(widths)), generator=torch.Generator().manual_seed(seed))
    for row, width in zip(logits, widths, strict=True):
        row[width:] = -torch.inf
    return logits


@pytest.mark.parametrize("asked", ASKED)
def test_a_row_gets_the_same_to_the_bit_beside_a_wider_one(asked: Any) -> None:
    logits = padded_logits([NARROW, WIDE, NARROW])
    mixed = Desk([Row(asked), Row(params(), vocab=WIDE), Row(asked)], NARROW).sample(logits)
    alone = Desk([Row(asked), Row(asked)], NARROW).sample(logits[[0, 2], :NARROW].contiguous())
    assert mixed.token_ids[[0, 2]].tolist() == alone.token_ids.tolist()
    assert mixed.logprobs.get(0) == alone.logprobs.get(0)
    assert mixed.logprobs.get(2) == alone.logprobs.get(1)
    assert not mixed.failed


@pytest.mark.parametrize("asked", ASKED)
def test_a_wide_row_is_treated_like_one_of_a_wide_base(asked: Any) -> None:
    logits = padded_logits([WIDE, NARROW, WIDE], seed=1)
    seen: dict[str, Any] = {"prompt": (5, 320, 7), "generated": (320, 331)}
    rows = [Row(asked, vocab=WIDE, **seen), Row(params()), Row(asked, vocab=WIDE, **seen)]
    mixed = Desk(rows, NARROW).sample(logits)
    wide_base = Desk([Row(asked, **seen)] * 2, WIDE).sample(logits[[0, 2]].contiguous())
    assert mixed.token_ids[[0, 2]].tolist() == wide_base.token_ids.tolist()
    assert mixed.logprobs.get(0) == wide_base.logprobs.get(0)
    if asked.temperature:
        token, margin = oracle_token(logits[0], Row(asked, **seen))
        assert mixed.token_ids[0] == token or margin < 1e-5


def test_a_bias_on_a_token_that_only_the_adapter_has() -> None:
    asked = params(logit_bias=((WIDE - 1, 1e4),))
    mixed = Desk([Row(params()), Row(asked, vocab=WIDE)], NARROW).sample(padded_logits([NARROW, WIDE]))
    assert mixed.token_ids[1] == WIDE - 1
    with pytest.raises(ValueError, match=f"names token {WIDE - 1}"):
        Desk([Row(asked)], NARROW)


def test_a_penalty_counts_tokens_that_only_the_adapter_has() -> None:
    logits = padded_logits([WIDE])
    logits[0, [320, 330]] = torch.tensor([50.0, 49.0])
    desk = Desk([Row(params(presence_penalty=2.0), vocab=WIDE)], NARROW)
    tokens = []
    for _ in range(3):
        sampled = desk.sample(logits)
        desk.append(sampled.token_ids)
        tokens += sampled.token_ids.tolist()
    assert tokens == [320, 330, 320], "both have their penalty in the end"


def test_broken_logits_fail_their_row_whatever_its_width() -> None:
    logits = padded_logits([NARROW, WIDE, NARROW])
    logits[1, 320], logits[2, 3] = torch.nan, torch.nan
    sampled = Desk([Row(params()), Row(params(), vocab=WIDE), Row(params())], NARROW).sample(logits)
    assert sorted(sampled.failed) == [1, 2]
    beyond = padded_logits([NARROW, WIDE, NARROW])
    beyond[0, WIDE - 1] = torch.nan  # not this row's column
    assert not Desk([Row(params()), Row(params(), vocab=WIDE), Row(params())], NARROW).sample(beyond).failed


# end to end: a model that got new tokens in training


def make_resized(model: PreTrainedModel, directory: Path, new_size: int) -> tuple[Path, Any]:
    """A LoRA adapter that was trained with a larger vocabulary, and PEFT's model with it."""
    larger = copy.deepcopy(model)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        larger.resize_token_embeddings(new_size)
        names = ["embed_tokens", "lm_head"]
        adapted = get_peft_model(larger, LoraConfig(target_modules=["q_proj"], modules_to_save=names, r=2))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        adapted.save_pretrained(str(directory))
        resized = copy.deepcopy(model)
        resized.resize_token_embeddings(new_size)
        return directory, PeftModel.from_pretrained(resized, str(directory)).eval()


def test_new_tokens_are_read_and_said_beside_the_base(tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    path, oracle = make_resized(model, tmp_path / "a", VOCAB + 8)
    engine = TinyEngine(model, tmp_path, chunk_size=16)
    ticket = engine.add("a", path)
    assert ticket.traits.vocab_size == VOCAB + 8
    prompt = [*random_prompt(20, seed=1), VOCAB + 3, VOCAB + 7, 5]
    bias = ((VOCAB + 5, 30.0),)  # or a tiny model would hardly ever say one
    base = Ask("base", random_prompt(20, seed=2), None, 12)
    engine.submit(base)
    wanted = SamplingParams(4, logit_bias=bias, num_logprobs=VOCAB + 8, ignore_eos=True)
    engine.engine.submit(EngineRequest("a", tuple(prompt), wanted, adapter=ticket))
    tokens: dict[str, list[int]] = {"a": [], "base": []}
    rows: dict[str, list[np.ndarray]] = {"a": [], "base": []}
    while engine.engine.has_work:
        for delta in engine.engine.step().special:
            tokens[delta.request_id] += delta.token_ids
            for record in delta.logprobs:
                row = np.full(VOCAB + 8, np.nan)
                row[[token for token, _ in record.top]] = [value for _, value in record.top]
                rows[delta.request_id].append(row)
    assert VOCAB + 5 in tokens["a"]
    with torch.inference_mode():
        logits = oracle(input_ids=torch.tensor([prompt + tokens["a"]])).logits[0, len(prompt) - 1 : -1]
    assert np.abs(np.stack(rows["a"]) - logits.log_softmax(-1).double().numpy()).max() < 1e-4
    again = engine.run([base])["base"]
    assert again.tokens == tokens["base"]
    assert np.array_equal(np.stack(rows["base"])[:, :VOCAB], again.logprobs), "to the bit, whoever shared its steps"
    assert_equals_oracle(base, again, model)
