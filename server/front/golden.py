"""Answers golden prompts: greedily, as any request is answered, apart from every tenant's cache."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from server.engine.request import SamplingParams
from server.front.errors import GenerationFailed
from server.front.text import TextFinishReason, TextRequest
from server.library.gate import Answer, GoldenPrompt

if TYPE_CHECKING:
    from server.front.front import Front

TIMEOUT_S = 120.0
_SALT = "golden prompts"  # no tenant is called so: names of the keys file hold no space


def golden_answers(front: Front) -> Answer:
    """An answer to (reference, prompt) from this front; it raises what the front raises."""

    async def answer(reference: str, prompt: GoldenPrompt) -> str:
        asked = TextRequest(
            prompt.inputs,
            SamplingParams(prompt.max_new_tokens),
            adapter=reference,
            request_id="golden",
            fit_length=True,
            cache_salt=_SALT,
            deadline_s=TIMEOUT_S,
        )
        generation = await front.open(asked)
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                if delta.finish is not None and delta.finish.reason is not TextFinishReason.ABORTED:
                    return delta.finish.generated_text
        raise GenerationFailed("the answer was broken off", retryable=True)

    return answer
