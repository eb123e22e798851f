"""What is asked of the engine and what it answers: plain data, so that it crosses the process border.

It knows no tensors, no tables and no schedule. Token ids are the base model's (or those of the adapter's larger
vocabulary), lengths are in tokens; an adapter's virtual tokens appear in neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from peft_core.traits import PLAIN_TRAITS, AdapterTraits

MIN_LOGPROB = -9999.0  # logprobs are clamped here, so that JSON never meets an infinity


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; the defaults are greedy with everything else off."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    presence_penalty: float = 0.0  # over generated tokens
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    min_new_tokens: int = 0  # end-of-sequence and stop ids are masked until then
    seed: int = 0  # always concrete: the front draws one when the caller gave none
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None  # None: none; 0: the chosen token only; n: chosen and top n
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens (the first has none)


@dataclass(frozen=True, slots=True)
class AdapterTicket:
    """A committed adapter version, resolved: what the engine needs in order to load it."""

    key: str  # effect digest: identity of the image and of the K/V it makes
    name: str  # "sql@3", for messages only
    image_path: str  # packed image, written when the version was committed
    num_bytes: int  # size of the image's payload
    traits: AdapterTraits = PLAIN_TRAITS


@dataclass(frozen=True, slots=True)
class EngineRequest:
    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    adapter: AdapterTicket | None = None  # None is the base
    cache_salt: str = ""  # tenant; part of the prefix cache's seed
    deadline_s: float | None = None  # seconds from submission; past it the request fails
    task_id: int | None = None  # for adapters that were trained on several tasks, and only for those


class FinishReason(StrEnum):
    """Why a request ended. Stop strings are the front's business: it sees text, and aborts."""

    LENGTH = "length"
    EOS = "eos"
    STOP_TOKEN = "stop_token"
    ABORTED = "aborted"
    FAILED = "failed"


class TokenLogprobs(NamedTuple):
    """One token's place in its distribution; floats are finite, clamped at `MIN_LOGPROB`."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first


class EngineErrorRecord(NamedTuple):
    """An `EngineError` as data."""

    kind: str  # class name in server.engine.errors
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class RequestDelta:
    """What one step says of one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # parallel to token_ids when asked for
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, with the first token
    num_cached_tokens: int = 0  # prefix-cache hit, told with the first token
    queue_s: float = 0.0  # seconds from its acceptance to its first step, told with the first token
    finish: FinishReason | None = None
    error: EngineErrorRecord | None = None  # when finish is FAILED


class AdapterState(StrEnum):
    """Where an adapter is, as the engine sees it. DEVICE is the pool that the kernels read; HOST is a copy of the image
    in memory outside the pool, from which it comes to the device without touching the disk.
    """

    DISK = "disk"
    HOST = "host"
    LOADING = "loading"
    DEVICE = "device"
    FAILED = "failed"


class Tier(StrEnum):
    """Where an adapter can be brought to, or taken from."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """One line of the engine's list of adapters; those that were never asked for are not in it."""

    key: str
    name: str
    state: AdapterState
    num_bytes: int
    num_units: int
    num_pins: int  # running sequences on it
    last_used_s: float  # on the engine's clock
    reason: str = ""  # why it failed, or why it is no longer on the device
    is_kept: bool = False  # pinned by the operator: it is loaded, and stays
    in_host: bool = False  # the host tier holds a copy, whatever the state
    idle_s: float = 0.0  # seconds since it was last used, when this was told
    num_uses: float = 0.0  # how often it was used, old uses counting less
    load_s: dict[str, float] = field(default_factory=dict)  # of its last load: queue, read, check, copy, bind
