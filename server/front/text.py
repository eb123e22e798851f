"""Text in, text out: what a caller asks of the front, and the pieces of the answer.

Running example, a stream of three tokens ended by a stop string that is not shown:

    TextRequest("Preheat the", stop=(".",), include_stop=False, params=SamplingParams(max_new_tokens=9))
    TextDelta(text=" oven", tokens=(" oven",))
    TextDelta(text=" to",   tokens=(" to",))
    TextDelta(text="",      tokens=(".",), finish=TextFinish("stop_sequence", " oven to", ...))
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from server.engine.request import SamplingParams

MAX_SEED = 2**63 - 1


def draw_seed() -> int:
    """A seed for a caller who gave none; it is told in the answer, so any answer can be repeated."""
    return secrets.randbelow(MAX_SEED + 1)


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One prompt. `params.seed` is concrete; sequence i of several is drawn with `params.seed + i`."""

    prompt: str | tuple[int, ...]  # text, or token ids taken as they are
    params: SamplingParams
    adapter: str | None = None  # "name", "name@alias" or "name@3"; None is the base
    sticky_key: str | None = None  # callers with the same one get the same version of a weighted alias
    task_id: int | None = None  # of an adapter that was trained on several tasks, and only of such a one
    request_id: str | None = None  # None: drawn
    fit_length: bool = False  # shorten max_new_tokens to what the model's length leaves, instead of refusing
    truncate: int | None = None  # keep only the last so many prompt tokens
    stop: tuple[str, ...] = ()
    include_stop: bool = True  # whether the stop string that ended the text is part of it
    echo: bool = False  # the text begins with the prompt
    add_special_tokens: bool = True  # as the tokenizer does by default (a beginning-of-text token, say)
    skip_special_tokens: bool = True  # in the text; `tokens` always has them
    num_sequences: int = 1  # independent continuations of the same prompt
    cache_salt: str = ""  # tenant: prompts are shared in the cache within one salt only
    deadline_s: float | None = None  # seconds for the whole request


class Alternative(NamedTuple):
    id: int
    text: str  # the token alone
    logprob: float
    special: bool


class GeneratedToken(NamedTuple):
    """A token of the answer, or of the prompt when its logprobs were asked for."""

    id: int
    text: str  # what it adds to the text: "" while a character is unfinished
    logprob: float | None  # None: not asked for, or the prompt's first token
    special: bool
    top: tuple[Alternative, ...] = ()  # best first


class TextFinishReason(StrEnum):
    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"  # a stop string or a stop token id
    ABORTED = "aborted"


class TextTiming(NamedTuple):
    """Seconds; measured by the front's clock, but the queue by the engine's."""

    queue_s: float  # accepted until first scheduled
    first_token_s: float  # accepted until the first token
    total_s: float  # accepted until the end


@dataclass(frozen=True, slots=True)
class TextFinish:
    reason: TextFinishReason
    generated_text: str  # the whole text, after the stop rule; begins with the prompt if echo was asked
    num_generated: int  # tokens
    num_prompt_tokens: int
    num_cached: int  # prompt tokens found in the prefix cache
    seed: int
    stop: str | None  # the stop string that was found
    timing: TextTiming


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new of one sequence. `text` holds back what a stop string may still swallow; `tokens` does not."""

    text: str = ""
    tokens: tuple[GeneratedToken, ...] = ()
    prompt_tokens: tuple[GeneratedToken, ...] | None = None  # once, when prompt logprobs were asked for
    finish: TextFinish | None = None
    sequence: int = 0  # which of `num_sequences`
