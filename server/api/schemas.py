"""The bodies of the native routes, in the dialect that text-generation clients speak.

Types are strict (no "0.5" for 0.5), explicit null means "not given" for every optional field, and what a body carries
beyond these fields is judged by `server.api.unknown`, which is why extra fields pass here. Fields that exist in the
dialect and cannot be honoured are declared so that a value in them is refused by name.

Running example: {"inputs": "Cook the rice", "adapter": "pirate", "parameters": {"max_new_tokens": 20}}
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from server.front.text import MAX_SEED

MAX_INT = 2**31 - 1


def _is_text(value: str) -> str:
    """Refuse lone surrogates: JSON can spell them, UTF-8 and tokenizers cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character; send valid Unicode") from None
    return value


def _is_prompt(value: str) -> str:
    if not value:
        raise ValueError("the prompt is empty; it must hold at least one character")
    return _is_text(value)


def _is_stop(value: str) -> str:
    if not value:
        raise ValueError("an empty stop string would end every answer at once; leave it out")
    return _is_text(value)


Text = Annotated[str, AfterValidator(_is_text)]
Prompt = Annotated[str, AfterValidator(_is_prompt), Field(json_schema_extra={"minLength": 1})]
StopText = Annotated[str, AfterValidator(_is_stop)]
Name = Annotated[Text, Field(max_length=300)]


class Parameters(BaseModel):
    """How to answer. Sampling is on when `do_sample` is, or when any of its knobs is away from neutral."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    adapter_id: Name | None = Field(None, description="The adapter; the same as the top-level `adapter`.")
    task_id: int | None = Field(None, ge=0, le=MAX_INT, description="The same as the top-level `task_id`.")
    max_new_tokens: int | None = Field(None, ge=1, description="Default: up to the model's length.")
    do_sample: bool | None = Field(None, description="False without a sampling knob is greedy.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy.")
    top_k: int | None = Field(None, ge=0, le=MAX_INT, description="0 is off.")
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Equal seeds give equal answers.")
    stop: list[StopText] | None = Field(None, description="The answer ends with the first of these that it produces.")
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_INT)]] | None = Field(None, max_length=64)
    min_new_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    ignore_eos_token: bool | None = None
    truncate: int | None = Field(None, ge=1, description="Keep only this many of the prompt's last tokens.")
    best_of: int | None = Field(None, ge=1, description="Sample this many answers and return the likeliest.")
    return_full_text: bool | None = Field(None, description="Put the prompt in front of the answer.")
    details: bool | None = None
    decoder_input_details: bool | None = Field(None, description="Logprobs of the prompt; implies `details`.")
    top_n_tokens: int | None = Field(None, ge=0, description="Alternatives per token, in `top_tokens`.")
    return_k_alternatives: int | None = Field(None, ge=0, description="Alternatives per token, inside each token.")
    watermark: bool | None = Field(None, description="Not supported: true is refused.")
    merged_adapters: Any = Field(None, description="Not supported: anything but null is refused.")
    grammar: Any = Field(None, description="Not supported: anything but null is refused.")
    response_format: Any = Field(None, description="Not supported: anything but null is refused.")
    adapter_source: Any = Field(None, description="Not supported: anything but null is refused.")
    api_token: Any = Field(None, description="Not supported: anything but null is refused.")


class GenerateRequest(BaseModel):
    model_config = ConfigDict(
        strict=True,
        extra="allow",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {"inputs": "Preheat the oven to 350 degrees and", "parameters": {"max_new_tokens": 20}},
                {
                    "inputs": "Preheat the oven to 350 degrees and",
                    "adapter": "pirate",
                    "parameters": {"max_new_tokens": 20, "temperature": 0.8, "seed": 7, "details": True},
                },
            ]
        },
    )

    inputs: Prompt = Field(description="The prompt.")
    adapter: Name | None = Field(None, description="`name`, `name@alias` or `name@version`; null is the base model.")
    adapter_id: Name | None = Field(None, description="The same as `adapter`.")
    sticky_key: Name | None = Field(
        None,
        description="Where the adapter's alias is shared by several versions, equal keys get the same one; "
        "the header `x-sticky-key` is the same. Without a key each request is assigned by chance.",
    )
    task_id: int | None = Field(
        None, ge=0, le=MAX_INT, description="Which task, of an adapter that was trained on several."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events, one a token.")
    parameters: Parameters | None = None


class AlternativeToken(BaseModel):
    id: int
    text: str
    logprob: float


class TopToken(AlternativeToken):
    special: bool


class Token(TopToken):
    alternative_tokens: list[AlternativeToken] | None = Field(None, description="With `return_k_alternatives`.")


class PrefillToken(BaseModel):
    id: int
    text: str
    logprob: float | None = Field(description="null for the first token, which nothing precedes.")


class BestOfSequence(BaseModel):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[TopToken]] | None = None


class Details(BaseModel):
    finish_reason: str = Field(description="length, eos_token or stop_sequence")
    generated_tokens: int
    prompt_tokens: int
    skipped_tokens: int = Field(description="Prompt tokens whose computation the prefix cache saved.")
    seed: int | None = Field(description="null when the answer was greedy.")
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[TopToken]] | None = None
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateReply(BaseModel):
    generated_text: str
    details: Details | None = None


class NativeError(BaseModel):
    error: str
    error_type: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ObjectError(BaseModel):
    error: ErrorBody
