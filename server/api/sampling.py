"""From a native body to a `TextRequest`: which adapter is meant, how tokens are drawn, and what is refused.

Running example: parameters {"temperature": 0.7}            -> sampled at 0.7 with a drawn seed
                 parameters {"do_sample": false}            -> greedy, seed told as null
                 adapter "sql" and parameters.adapter_id "poet" -> refused, both named
"""

from __future__ import annotations

from server.api.errors import Invalid
from server.api.schemas import GenerateRequest, Parameters
from server.engine.request import SamplingParams
from server.front.text import TextRequest, draw_seed
from server.settings import Settings

STICKY_HEADER = "x-sticky-key"  # for clients whose bodies cannot carry fields of ours
_MAX_STICKY_CHARS = 300
BASE_NAMES = ("", "__base_model__")  # how some clients spell "no adapter"
_UNSUPPORTED = {
    "merged_adapters": "adapters are not merged per request; name one with `adapter`",
    "grammar": "constrained answers are not served",
    "response_format": "constrained answers are not served",
    "adapter_source": "an adapter is registered first, at start or under /admin/v1/adapters, and then named",
    "api_token": "adapters are not downloaded per request, so no token is needed",
}


def adapter_of(body: GenerateRequest) -> str | None:
    """The one adapter a body names, None for the base. Raises Invalid when it names two."""
    nested = body.parameters.adapter_id if body.parameters else None
    named = {name for name in (body.adapter, body.adapter_id, nested) if name is not None and name not in BASE_NAMES}
    if len(named) > 1:
        first, second = sorted(named)[:2]
        raise Invalid(f"the body names two adapters, {first!r} and {second!r}; name one, best as `adapter`.")
    return named.pop() if named else None


def _task_of(body: GenerateRequest) -> int | None:
    """The task that a body names. Raises Invalid when it names two."""
    nested = body.parameters.task_id if body.parameters else None
    named = {task for task in (body.task_id, nested) if task is not None}
    if len(named) > 1:
        first, second = sorted(named)
        raise Invalid(f"the body names two tasks, {first} and {second}; name one, best as `task_id`.")
    return named.pop() if named else None


def sticky_key_of(body: GenerateRequest, header: str | None) -> str | None:
    """The key that keeps a caller on one version. Raises Invalid when body and header name two, or it is too long."""
    if header is not None and len(header) > _MAX_STICKY_CHARS:
        raise Invalid(f"the header {STICKY_HEADER} has {len(header)} characters; it may have {_MAX_STICKY_CHARS}.")
    named = {key for key in (body.sticky_key, header) if key}
    if len(named) > 1:
        raise Invalid(f"`sticky_key` and the header {STICKY_HEADER} differ; send one of them.")
    return named.pop() if named else None


def is_sampled(parameters: Parameters) -> bool:
    """Sampling is on when asked for, or when any of its knobs is away from neutral; temperature 0 is greedy."""
    if parameters.temperature == 0:
        return False
    return bool(
        parameters.do_sample
        or parameters.temperature not in (None, 1.0)
        or parameters.top_k
        or (parameters.top_p or 1.0) < 1.0
        or (parameters.typical_p or 1.0) < 1.0
        or parameters.min_p
    )


def text_request(
    body: GenerateRequest, settings: Settings, *, is_stream: bool, sticky_header: str | None = None
) -> TextRequest:
    """What the front is asked for.

    Raises:
        Invalid: a field we cannot honour, a limit of this server, or fields that contradict each other.
    """
    parameters = body.parameters or Parameters.model_validate({})
    _refuse_unsupported(parameters)
    _refuse_beyond_limits(parameters, settings)
    _refuse_contradictions(parameters, is_stream=is_stream)
    num_top = max(parameters.top_n_tokens or 0, parameters.return_k_alternatives or 0)
    tells_tokens = is_stream or wants_details(parameters) or (parameters.best_of or 1) > 1
    return TextRequest(
        prompt=body.inputs,
        adapter=adapter_of(body),
        sticky_key=sticky_key_of(body, sticky_header),
        task_id=_task_of(body),
        params=_sampling_params(parameters, settings, num_logprobs=num_top if tells_tokens else None),
        fit_length=parameters.max_new_tokens is None,
        truncate=parameters.truncate,
        stop=tuple(parameters.stop or ()),
        include_stop=True,
        echo=bool(parameters.return_full_text),
        num_sequences=parameters.best_of or 1,
        deadline_s=settings.request_timeout_s,
    )


def wants_details(parameters: Parameters | None) -> bool:
    return parameters is not None and bool(parameters.details or parameters.decoder_input_details)


def _sampling_params(parameters: Parameters, settings: Settings, num_logprobs: int | None) -> SamplingParams:
    temperature = 0.0
    if is_sampled(parameters):
        temperature = 1.0 if parameters.temperature is None else parameters.temperature
    return SamplingParams(
        max_new_tokens=parameters.max_new_tokens or _UNBOUNDED_TOKENS,
        temperature=temperature,
        top_k=parameters.top_k or 0,
        top_p=_or(parameters.top_p, 1.0),
        min_p=_or(parameters.min_p, 0.0),
        typical_p=_or(parameters.typical_p, 1.0),
        repetition_penalty=_or(parameters.repetition_penalty, 1.0),
        frequency_penalty=_or(parameters.frequency_penalty, 0.0),
        presence_penalty=_or(parameters.presence_penalty, 0.0),
        min_new_tokens=parameters.min_new_tokens or 0,
        seed=draw_seed() if parameters.seed is None else parameters.seed,
        stop_token_ids=tuple(parameters.stop_token_ids or ()),
        ignore_eos=bool(parameters.ignore_eos_token),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=0 if parameters.decoder_input_details else None,
    )


_UNBOUNDED_TOKENS = 2**20  # shortened by the front to what the model's length leaves


def _refuse_unsupported(parameters: Parameters) -> None:
    for name, reason in _UNSUPPORTED.items():
        if getattr(parameters, name) is not None:
            raise Invalid(f"`parameters.{name}` is not supported: {reason}.")
    if parameters.watermark:
        raise Invalid("`parameters.watermark` is not supported: answers are not watermarked.")


def _refuse_beyond_limits(parameters: Parameters, settings: Settings) -> None:
    num_stops = len(parameters.stop or ())
    for name, value, limit, flag in (
        ("best_of", parameters.best_of or 1, settings.max_best_of, "--max-best-of"),
        ("stop", num_stops, settings.max_stop_sequences, "--max-stop-sequences"),
        ("top_n_tokens", parameters.top_n_tokens or 0, settings.max_top_n_tokens, "--max-top-n-tokens"),
        (
            "return_k_alternatives",
            parameters.return_k_alternatives or 0,
            settings.max_top_n_tokens,
            "--max-top-n-tokens",
        ),
    ):
        if value > limit:
            what = "strings" if name == "stop" else "as its value"
            raise Invalid(f"`parameters.{name}` has {value} {what}, this server takes {limit} ({flag}).")


def _refuse_contradictions(parameters: Parameters, *, is_stream: bool) -> None:
    if (parameters.best_of or 1) > 1:
        if not is_sampled(parameters):
            raise Invalid("`best_of` > 1 needs sampling; a greedy answer is the same each time. Set `do_sample`.")
        if parameters.seed is not None:
            raise Invalid("`best_of` > 1 draws a seed per answer; leave `seed` out.")
        if is_stream:
            raise Invalid("`best_of` > 1 cannot be streamed: which answer is best is known at the end.")
    if parameters.decoder_input_details and is_stream:
        raise Invalid("`decoder_input_details` cannot be streamed; ask for it without `stream`.")
    if (
        parameters.min_new_tokens
        and parameters.max_new_tokens
        and parameters.min_new_tokens > parameters.max_new_tokens
    ):
        raise Invalid(
            f"`min_new_tokens` {parameters.min_new_tokens} is more than `max_new_tokens` {parameters.max_new_tokens}."
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
