"""What can go wrong between a caller's text and the engine's tokens.

FrontError
├── CannotStart             the model, its tokenizer, the store or the loader cannot be brought up
├── InvalidRequest          the request can never work as it stands
│   └── PromptTooLong       ... because of its length
├── TemplateFailed          the chat template is missing, or refused the messages
├── Overloaded              the queue is full; later it may work
├── EngineGone              the engine is starting, restarting or stopped; later it may work
├── DeadlineExceeded        the request's own time ran out
└── GenerationFailed        the engine accepted the request and could not finish it
    └── AdapterFailed       ... because its adapter could not be loaded

Errors of the adapter library (unknown name, broken files) pass through unchanged.
Each class says a stable `code` and whether the same request may work later.
"""

from __future__ import annotations

from typing import ClassVar


class FrontError(Exception):
    """Base of all errors of this package; `str(error)` is fit to be shown to the caller."""

    code: ClassVar[str] = "internal"
    retryable: bool = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CannotStart(FrontError):
    code = "cannot_start"


class InvalidRequest(FrontError):
    code = "validation"


class PromptTooLong(InvalidRequest):
    """Prompt and answer do not fit the model: all numbers in tokens."""

    def __init__(
        self, num_prompt_tokens: int, max_new_tokens: int, max_model_len: int, num_virtual_tokens: int = 0
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.max_model_len = max_model_len
        room = max_model_len - num_virtual_tokens - num_prompt_tokens
        shared = f", {num_virtual_tokens} of which the adapter takes" if num_virtual_tokens else ""
        advice = (
            f"Ask for at most {room} new tokens or shorten the prompt"
            if room > 0
            else f"Shorten the prompt to at most {max_model_len - num_virtual_tokens - 1} tokens"
        )
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens and max_new_tokens is {max_new_tokens}, together "
            f"{num_prompt_tokens + max_new_tokens}; the model takes {max_model_len} tokens in all{shared}. {advice}."
        )


class TemplateFailed(FrontError):
    code = "template_error"


class Overloaded(FrontError):
    """`retry_after_s`: whole seconds after which trying again makes sense."""

    code = "overloaded"
    retryable = True

    def __init__(self, num_queued: int, max_queued_requests: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            f"{num_queued} requests are waiting and the queue holds {max_queued_requests}; "
            f"try again in {retry_after_s} s."
        )


class EngineGone(FrontError):
    code = "unavailable"
    retryable = True


class DeadlineExceeded(FrontError):
    code = "timeout"


class GenerationFailed(FrontError):
    """The engine's own words; `retryable` is what the engine says of this failure."""

    code = "generation"

    def __init__(self, message: str, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class AdapterFailed(GenerationFailed):
    code = "adapter_failed"
