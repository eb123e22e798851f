"""What a user could script today on the same weights: transformers' own generation, and PEFT's two ways of mixing.

Each contender answers the same prompts greedily with exactly `num_new` tokens and returns them. End-of-sequence tokens
are switched off, so that nobody stops early. PEFT keeps its defaults (on a bfloat16 base its adapters stay float32).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

Tokens = list[list[int]]  # [requests][new tokens]


class Timed(NamedTuple):
    seconds: float
    tokens: Tokens


class Contender(NamedTuple):
    name: str
    run: Callable[[], Timed]  # one round; set-up is not part of its seconds


def plain_model(directory: Path, dtype: torch.dtype, device: str) -> Any:
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    return model


def adapted_model(directory: Path, adapters: list[Path], dtype: torch.dtype, device: str) -> Any:
    """A PeftModel with all adapters loaded, called a0, a1, ..."""
    base = plain_model(directory, dtype, device)
    model = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name="a0")
    for number, path in enumerate(adapters[1:], start=1):
        model.load_adapter(str(path), adapter_name=f"a{number}")
    return model.to(device).eval()


def generate(model: Any, prompts: Tokens, num_new: int) -> Contender:
    """`generate` on one padded batch of prompts of equal length."""
    return Contender("transformers generate", lambda: _timed(lambda: _generate(model, prompts, num_new)))


def continuous_batching(model: Any, prompts: Tokens, num_new: int) -> Contender:
    """`generate_batch`. Its manager is made anew and warmed up before each round and ended after it, since its
    thread would take processor time from the other contenders."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    pages_each = -(-(len(prompts[0]) + num_new) // 256) + 1
    settings = ContinuousBatchingConfig(num_blocks=len(prompts) * pages_each, max_batch_tokens=2048)

    def answer(new_tokens: int) -> Tokens:
        wanted = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = model.generate_batch(
            prompts, generation_config=wanted, continuous_batching_config=settings, persistent_manager=True
        )
        answers = {tuple(output.prompt_ids): list(output.generated_tokens) for output in outputs.values()}
        return [answers[tuple(prompt)] for prompt in prompts]

    def round_() -> Timed:
        answer(2)
        try:
            return _timed(lambda: answer(num_new))
        finally:
            model.destroy_cached_continuous_batching_manager()

    return Contender("transformers continuous batching", round_)


def peft_mixed(model: Any, prompts: Tokens, num_new: int, num_adapters: int) -> Contender:
    """One batch, an adapter a row by `adapter_names`."""
    names = [f"a{index % num_adapters}" for index in range(len(prompts))]
    return Contender(
        f"PEFT mixed, {num_adapters} adapters",
        lambda: _timed(lambda: _generate(model, prompts, num_new, adapter_names=names)),
    )


def peft_one_by_one(model: Any, prompts: Tokens, num_new: int, num_adapters: int) -> Contender:
    """A call of `generate` a request, after `set_adapter`."""

    def answer() -> Tokens:
        tokens: Tokens = []
        for index, prompt in enumerate(prompts):
            model.set_adapter(f"a{index % num_adapters}")
            tokens += _generate(model, [prompt], num_new)
        return tokens

    return Contender(f"PEFT one by one, {num_adapters} adapters", lambda: _timed(answer))


def _generate(model: Any, prompts: Tokens, num_new: int, **more: Any) -> Tokens:
    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
            **more,
        )
    answers: Tokens = output[:, ids.shape[1] :].tolist()
    return answers


def _timed(answer: Callable[[], Tokens]) -> Timed:
    start_s = time.perf_counter()
    tokens = answer()
    return Timed(time.perf_counter() - start_s, tokens)
