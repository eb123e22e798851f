"""The engine's messages as JSON-able data, both ways.

    front -> engine   submit, expect, abort, load, evict, keep, residency, stop
    engine -> front   progress, ready, failed, step, stats, reply

One `step` message carries a whole step: the ordinary case, one new token of a request and at most its
own log probability, costs an entry in each of some parallel arrays; only what says more is an object. Fields at
their default are not sent. What cannot be read back exactly raises `ValueError` or `TypeError`.

Running example: requests "a" and "b" got one token each, "c" its first token and its end

    {"kind": "step", "ids": ["a", "b"], "tokens": [17, 4], "computed": 9,
     "special": [{"id": "c", "tokens": [2], "cached": 16, "finish": "eos"}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from peft_core.traits import PLAIN_TRAITS, AdapterTraits
from server.engine import errors
from server.engine.description import EngineDescription
from server.engine.request import (
    AdapterState,
    AdapterTicket,
    EngineErrorRecord,
    EngineRequest,
    FinishReason,
    RequestDelta,
    ResidentAdapter,
    SamplingParams,
    TokenLogprobs,
)
from server.engine.stats import EngineStats
from server.engine.step import AdapterEvent, StepOutput

Json = dict[str, Any]

SUBMIT, ABORT, LOAD, EVICT, RESIDENCY, STOP = "submit", "abort", "load", "evict", "residency", "stop"
EXPECT, KEEP = "expect", "keep"
PROGRESS, READY, FAILED, STEP, STATS, REPLY = "progress", "ready", "failed", "step", "stats", "reply"

_PARAM_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}


def params_to_json(params: SamplingParams) -> Json:
    values = {name: getattr(params, name) for name in _PARAM_DEFAULTS}
    return {name: value for name, value in values.items() if value != _PARAM_DEFAULTS[name]}


def params_from_json(data: Mapping[str, Any]) -> SamplingParams:
    values = dict(data)
    if "logit_bias" in values:
        values["logit_bias"] = tuple((token_id, bias) for token_id, bias in values["logit_bias"])
    if "stop_token_ids" in values:
        values["stop_token_ids"] = tuple(values["stop_token_ids"])
    return SamplingParams(**values)


def request_to_json(request: EngineRequest) -> Json:
    data: Json = {
        "request_id": request.request_id,
        "token_ids": request.token_ids,
        "params": params_to_json(request.params),
    }
    if request.adapter is not None:
        data["adapter"] = ticket_to_json(request.adapter)
    if request.cache_salt:
        data["cache_salt"] = request.cache_salt
    if request.deadline_s is not None:
        data["deadline_s"] = request.deadline_s
    if request.task_id is not None:
        data["task_id"] = request.task_id
    return data


def request_from_json(data: Mapping[str, Any]) -> EngineRequest:
    adapter = data.get("adapter")
    return EngineRequest(
        request_id=data["request_id"],
        token_ids=tuple(data["token_ids"]),
        params=params_from_json(data["params"]),
        adapter=None if adapter is None else ticket_from_json(adapter),
        cache_salt=data.get("cache_salt", ""),
        deadline_s=data.get("deadline_s"),
        task_id=data.get("task_id"),
    )


def ticket_to_json(ticket: AdapterTicket) -> Json:
    data = {field.name: getattr(ticket, field.name) for field in fields(AdapterTicket)}
    traits = data.pop("traits")
    return data if traits == PLAIN_TRAITS else {**data, "traits": traits.to_json()}


def ticket_from_json(data: Mapping[str, Any]) -> AdapterTicket:
    values = dict(data)
    if "traits" in values:
        values["traits"] = AdapterTraits.from_json(values["traits"])
    return AdapterTicket(**values)


def delta_to_json(delta: RequestDelta) -> Json:
    data: Json = {"id": delta.request_id}
    if delta.token_ids:
        data["tokens"] = delta.token_ids
    if delta.logprobs:
        data["logprobs"] = delta.logprobs
    if delta.prompt_logprobs is not None:
        data["prompt_logprobs"] = delta.prompt_logprobs
    if delta.num_cached_tokens:
        data["cached"] = delta.num_cached_tokens
    if delta.queue_s:
        data["queue_s"] = delta.queue_s
    if delta.finish is not None:
        data["finish"] = delta.finish.value
    if delta.error is not None:
        data["error"] = delta.error
    return data


def delta_from_json(data: Mapping[str, Any]) -> RequestDelta:
    prompt, finish, error = data.get("prompt_logprobs"), data.get("finish"), data.get("error")
    return RequestDelta(
        request_id=data["id"],
        token_ids=tuple(data.get("tokens", ())),
        logprobs=tuple(logprobs_from_json(record) for record in data.get("logprobs", ())),
        prompt_logprobs=None
        if prompt is None
        else tuple(None if record is None else logprobs_from_json(record) for record in prompt),
        num_cached_tokens=data.get("cached", 0),
        queue_s=data.get("queue_s", 0.0),
        finish=None if finish is None else FinishReason(finish),
        error=None if error is None else EngineErrorRecord(*error),
    )


def step_to_json(output: StepOutput) -> Json:
    data: Json = {"kind": STEP, "ids": output.request_ids, "tokens": output.token_ids, "computed": output.num_tokens}
    if output.logprobs:
        data["logprobs"] = output.logprobs
    if output.special:
        data["special"] = [delta_to_json(delta) for delta in output.special]
    if output.adapter_events:
        data["events"] = output.adapter_events
    return data


def step_from_json(data: Mapping[str, Any]) -> StepOutput:
    return StepOutput(
        request_ids=data["ids"],
        token_ids=data["tokens"],
        logprobs=[None if record is None else logprobs_from_json(record) for record in data.get("logprobs", ())],
        special=[delta_from_json(delta) for delta in data.get("special", ())],
        adapter_events=[AdapterEvent(*event) for event in data.get("events", ())],
        num_tokens=data["computed"],
    )


def stats_to_json(stats: EngineStats) -> Json:
    return asdict(stats)


def stats_from_json(data: Mapping[str, Any]) -> EngineStats:
    return EngineStats(**data)


def description_to_json(description: EngineDescription) -> Json:
    data = {field.name: getattr(description, field.name) for field in fields(EngineDescription)}
    return {**data, "spec": dict(description.spec)}


def description_from_json(data: Mapping[str, Any]) -> EngineDescription:
    return EngineDescription(**{**data, "eos_token_ids": tuple(data["eos_token_ids"])})


def residents_to_json(residents: list[ResidentAdapter]) -> list[Json]:
    return [asdict(resident) for resident in residents]


def residents_from_json(data: list[Json]) -> list[ResidentAdapter]:
    return [ResidentAdapter(**{**resident, "state": AdapterState(resident["state"])}) for resident in data]


def logprobs_from_json(record: list[Any]) -> TokenLogprobs:
    token_id, logprob, rank, top = record
    return TokenLogprobs(token_id, logprob, rank, tuple((other_id, other) for other_id, other in top))


def error_from_record(record: EngineErrorRecord) -> errors.EngineError:
    """The exception that a record tells of; one of a kind we do not know is a plain `EngineError`."""
    found = getattr(errors, record.kind, None)
    if isinstance(found, type) and issubclass(found, errors.EngineError):
        return found(record.message)
    return errors.EngineError(record.message)
