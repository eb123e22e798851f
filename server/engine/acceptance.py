"""May this request be accepted? Everything that would make it impossible later is refused here, with numbers.

Accepting is a promise: the request ends in exactly one of finished, aborted, failed.
"""

from __future__ import annotations

from server.engine.errors import InvalidRequest, RequestTooLong
from server.engine.limits import EngineLimits
from server.engine.request import AdapterTicket, EngineRequest, SamplingParams

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


def check_request(request: EngineRequest, limits: EngineLimits) -> None:
    """Refuse token ids, a task and sampling parameters out of range; an adapter may have more ids than the base.

    Raises:
        InvalidRequest: naming the field, its value and the range.
    """
    _check(bool(request.request_id), "request_id", request.request_id, "a text that is not empty")
    _check(len(request.token_ids) > 0, "token_ids", (), "at least one token")
    vocab_size = vocab_size_of(request, limits)
    outside = next((token_id for token_id in request.token_ids if not 0 <= token_id < vocab_size), None)
    _check(outside is None, "token_ids", outside, f"ids from 0 to {vocab_size - 1}")
    _check_task(request.adapter, request.task_id)
    deadline_s = request.deadline_s
    _check(deadline_s is None or deadline_s > 0, "deadline_s", deadline_s, "more than 0 seconds, or none")
    _check_params(request.params, vocab_size)


def vocab_size_of(request: EngineRequest, limits: EngineLimits) -> int:
    """Token ids that the request may name and be answered with."""
    own = None if request.adapter is None else request.adapter.traits.vocab_size
    return max(limits.vocab_size, own or 0)


def max_length_of(request: EngineRequest, limits: EngineLimits, *, block_size: int, adapter_units: int) -> int:
    """Tokens at which the request ends by length: what it asked for, as far as model and pool go.

    An adapter's virtual tokens take places like any other, and are counted in.

    Raises:
        RequestTooLong: not even one token could be generated.
    """
    num_virtual = 0 if request.adapter is None else request.adapter.traits.num_virtual_tokens
    prompt_length = num_virtual + len(request.token_ids)
    said = f"{len(request.token_ids)} tokens"
    if num_virtual:
        said += f" after the adapter's {num_virtual} virtual ones"
    if prompt_length >= limits.max_model_len:
        most = limits.max_model_len - 1 - num_virtual
        remedy = f"Shorten the prompt to at most {most} tokens." if most > 0 else "Use another adapter."
        raise RequestTooLong(
            f"the prompt has {said} and the model's maximum length is {limits.max_model_len}, which "
            f"leaves no room for an answer. {remedy}"
        )
    # The last generated token is never computed, so it needs no place in the pool.
    room = (limits.num_units - adapter_units) * block_size + 1
    if prompt_length >= room:
        raise RequestTooLong(
            f"the prompt has {said}, and beside its adapter ({adapter_units} units) the pool of "
            f"{limits.num_units} units holds {room - 1}. Shorten the prompt, or start with a larger pool."
        )
    return min(prompt_length + request.params.max_new_tokens, limits.max_model_len, room)


def _check_task(adapter: AdapterTicket | None, task_id: int | None) -> None:
    num_tasks = 0 if adapter is None else adapter.traits.num_tasks
    if num_tasks:
        assert adapter is not None
        is_good = task_id is not None and 0 <= task_id < num_tasks
        _check(is_good, "task_id", task_id, f"0 to {num_tasks - 1}: {adapter.name} was trained on {num_tasks} tasks")
    else:
        name = "the base" if adapter is None else adapter.name
        _check(task_id is None, "task_id", task_id, f"left out: {name} has no tasks")


def _check_params(params: SamplingParams, vocab_size: int) -> None:
    p = params
    _check(p.max_new_tokens >= 1, "max_new_tokens", p.max_new_tokens, "at least 1")
    new_range = f"0 to max_new_tokens ({p.max_new_tokens})"
    _check(0 <= p.min_new_tokens <= p.max_new_tokens, "min_new_tokens", p.min_new_tokens, new_range)
    _check(
        _is_float32(p.temperature) and p.temperature >= 0, "temperature", p.temperature, "0 or more, finite in float32"
    )
    _check(p.top_k >= 0, "top_k", p.top_k, "0 (off) or more")
    _check(0 < p.top_p <= 1, "top_p", p.top_p, "more than 0, at most 1")
    _check(0 <= p.min_p <= 1, "min_p", p.min_p, "0 to 1")
    _check(0 < p.typical_p <= 1, "typical_p", p.typical_p, "more than 0, at most 1")
    repetition = p.repetition_penalty
    _check(
        _is_float32(repetition) and repetition > 0, "repetition_penalty", repetition, "more than 0, finite in float32"
    )
    _check(_is_float32(p.frequency_penalty), "frequency_penalty", p.frequency_penalty, "finite in float32")
    _check(_is_float32(p.presence_penalty), "presence_penalty", p.presence_penalty, "finite in float32")
    for token_id, bias in p.logit_bias:
        _check(0 <= token_id < vocab_size, "logit_bias", token_id, f"ids from 0 to {vocab_size - 1}")
        _check(_is_float32(bias), "logit_bias", bias, "finite in float32")
    for token_id in p.stop_token_ids:
        _check(0 <= token_id < vocab_size, "stop_token_ids", token_id, f"ids from 0 to {vocab_size - 1}")
    for name, count in (("num_logprobs", p.num_logprobs), ("num_prompt_logprobs", p.num_prompt_logprobs)):
        _check(count is None or 0 <= count <= vocab_size, name, count, f"0 to {vocab_size}, or none")


def _is_float32(value: float) -> bool:
    """Finite in the arithmetic of the sampler."""
    return abs(value) <= _LARGEST_FLOAT32


def _check(is_good: bool, name: str, value: object, expected: str) -> None:
    if not is_good:
        raise InvalidRequest(f"{name} is {value!r}, and must be {expected}.")
