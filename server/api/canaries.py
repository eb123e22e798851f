"""Canaries and promotion gates over HTTP: how a new version earns its place under an alias.

    POST   /admin/v1/adapters/{name}/aliases/{alias}/canary    {"version": 4, "percent": 10, "max_error_rate": 0.05}
    GET    /admin/v1/adapters/{name}/aliases/{alias}/canary    how it fares, or how it ended
    DELETE /admin/v1/adapters/{name}/aliases/{alias}/canary    stop it: the alias means again what it did
    PUT    /admin/v1/adapters/{name}/aliases/{alias}/gate      golden prompts that stand before every move
    GET    /admin/v1/adapters/{name}/aliases/{alias}/gate
    DELETE /admin/v1/adapters/{name}/aliases/{alias}/gate
    POST   /admin/v1/adapters/{name}/aliases/{alias}/gate/check?version=4    ask them, move nothing

A canary that went well is promoted by pointing the alias to its version. `If-Match` with the adapter's `ETag` makes
each of these changes conditional.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Body, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from adapters_store.alias import weights_to_json
from adapters_store.names import check_alias, check_name
from server.api.adapter_view import Name, front_of
from server.api.aliases import AliasName, SkipGate
from server.api.audit import changed, unchanged
from server.api.documented import ADMIN_CHANGE, ADMIN_ONE, Responses
from server.api.errors import AdminRefusal
from server.api.guarded_route import admin, conditional, guarded_router
from server.api.preconditions import Precondition
from server.api.schemas import Prompt
from server.front.front import Front
from server.library.gate import MAX_PROMPTS, Gate, GoldenPrompt, Verdict
from server.library.releases import CanaryOrder

router = guarded_router(prefix="/admin/v1", tags=["Canaries and gates"])
_ALIAS = "/adapters/{name:path}/aliases/{alias}"
_GONE: Responses = {**ADMIN_CHANGE, 204: {"description": "The alias has no gate."}}
_Expected = Annotated[str, Field(min_length=1, max_length=10_000)]


class CanaryBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    version: int = Field(ge=1, lt=10**9)
    percent: int = Field(10, ge=1, le=99, description="Of the alias's requests.")
    max_error_rate: float = Field(0.05, ge=0, lt=1, description="More failures than this share roll it back.")
    min_requests: int = Field(20, ge=1, le=10_000, description="Nothing is decided on fewer requests.")
    window: int = Field(200, ge=1, le=10_000, description="How many of its last requests are looked at.")


class CanaryResource(BaseModel):
    object: Literal["adapter.canary"] = "adapter.canary"
    name: str
    alias: str
    version: int
    weights: dict[str, int]
    before: dict[str, int] = Field(description="What the alias meant, and means again when the canary ends.")
    max_error_rate: float
    min_requests: int
    window: int
    state: str = Field(description="running, rolled_back (by itself), stopped or moved")
    reason: str | None = Field(description="Why it ended.")
    requests: int | None = Field(description="Answered on it by this server since it watches; null once it ended.")
    failed: int | None
    error_rate: float | None = Field(description="Of the last `window` requests.")
    started_at: str
    ended_at: str | None


class GoldenPromptBody(BaseModel):
    """Answered greedily; without an expectation it must only be answered."""

    model_config = ConfigDict(strict=True, extra="forbid")

    inputs: Prompt
    max_new_tokens: int = Field(32, ge=1, le=4096)
    equals: str | None = Field(None, max_length=100_000, description="The whole answer.")
    contains: list[_Expected] = Field([], max_length=64)
    lacks: list[_Expected] = Field([], max_length=64)


class GateBody(BaseModel):
    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        json_schema_extra={"examples": [{"prompts": [{"inputs": "2+2=", "max_new_tokens": 4, "contains": ["4"]}]}]},
    )

    prompts: list[GoldenPromptBody] = Field(min_length=1, max_length=MAX_PROMPTS)
    min_passed: int | None = Field(None, ge=1, description="How many must pass; default: all.")


class GoldenResultResource(BaseModel):
    inputs: str
    answer: str | None
    reason: str | None = Field(description="Why it failed; null if it passed.")


class VerdictResource(BaseModel):
    object: Literal["adapter.verdict"] = "adapter.verdict"
    adapter: str = Field(description="name@version")
    passed: bool
    results: list[GoldenResultResource]


@router.post(_ALIAS + "/canary", summary="Start a canary", status_code=201, responses=ADMIN_CHANGE)
@admin
@conditional
async def start_canary(
    request: Request, name: Name, alias: AliasName, body: Annotated[CanaryBody, Body()], skip_gate: SkipGate = False
) -> CanaryResource:
    """The version gets its share of the alias's requests, and loses it by itself when too many of them fail."""
    front, precondition = front_of(request), Precondition.of(request.headers)
    if body.min_requests > body.window:
        raise AdminRefusal(422, "validation", "`min_requests` is larger than `window`, so nothing could ever end it")
    order = CanaryOrder(body.version, body.percent, body.max_error_rate, body.min_requests, body.window)
    await front.library.releases.start_canary(
        check_name(name), alias, order, expect=precondition.check, skip_gate=skip_gate
    )
    changed(request, "canary.start", f"{name}@{alias}", **body.model_dump(), skip_gate=skip_gate)
    return await _canary(front, name, alias)


@router.get(_ALIAS + "/canary", summary="How a canary fares", responses=ADMIN_CHANGE)
@admin
async def show_canary(request: Request, name: Name, alias: AliasName) -> CanaryResource:
    front = front_of(request)
    front.library.catalog.record(check_name(name))
    return await _canary(front, name, check_alias(alias))


@router.delete(_ALIAS + "/canary", summary="Stop a canary", responses=ADMIN_CHANGE)
@admin
@conditional
async def stop_canary(request: Request, name: Name, alias: AliasName) -> CanaryResource:
    """The alias means again what it did before."""
    front, precondition = front_of(request), Precondition.of(request.headers)
    front.library.catalog.record(check_name(name))
    ended = await front.library.releases.stop_canary(name, alias, expect=precondition.check)
    changed(request, "canary.stop", f"{name}@{alias}", version=ended.version)
    return await _canary(front, name, alias)


@router.put(_ALIAS + "/gate", summary="Put golden prompts before an alias", responses=ADMIN_ONE)
@admin
@conditional
async def set_gate(request: Request, name: Name, alias: AliasName, body: Annotated[GateBody, Body()]) -> GateBody:
    """From now on the alias moves only to versions that pass: by hand, by an upload, or as a canary."""
    if body.min_passed is not None and body.min_passed > len(body.prompts):
        raise AdminRefusal(422, "validation", f"`min_passed` is more than the {len(body.prompts)} prompts there are")
    prompts = [
        GoldenPrompt(item.inputs, item.max_new_tokens, item.equals, tuple(item.contains), tuple(item.lacks))
        for item in body.prompts
    ]
    gate, precondition = Gate(tuple(prompts), body.min_passed), Precondition.of(request.headers)
    await front_of(request).library.releases.set_gate(check_name(name), alias, gate, expect=precondition.check)
    changed(request, "gate.set", f"{name}@{alias}", prompts=len(prompts), min_passed=body.min_passed)
    return body


@router.get(_ALIAS + "/gate", summary="Show an alias's golden prompts", responses=ADMIN_ONE)
@admin
async def show_gate(request: Request, name: Name, alias: AliasName) -> GateBody:
    front = front_of(request)
    front.library.catalog.record(check_name(name))
    gate = await front.library.releases.gate(name, check_alias(alias))
    if gate is None:
        raise AdminRefusal(404, "gate_not_found", f"{name}@{alias} has no gate")
    return GateBody.model_validate(gate.to_json(), strict=False)


@router.delete(_ALIAS + "/gate", summary="Open a gate", status_code=204, responses=_GONE, response_class=Response)
@admin
@conditional
async def remove_gate(request: Request, name: Name, alias: AliasName) -> Response:
    precondition = Precondition.of(request.headers)
    await front_of(request).library.releases.set_gate(check_name(name), alias, None, expect=precondition.check)
    changed(request, "gate.delete", f"{name}@{alias}")
    return Response(status_code=204)


@router.post(_ALIAS + "/gate/check", summary="Ask a version the golden prompts", responses=ADMIN_CHANGE)
@admin
async def check_gate(
    request: Request, name: Name, alias: AliasName, version: Annotated[int, Query(ge=1, lt=10**9)]
) -> VerdictResource:
    """Moves nothing."""
    unchanged(request)
    verdict = await front_of(request).library.releases.judge(check_name(name), check_alias(alias), version)
    return verdict_resource(verdict)


def verdict_resource(verdict: Verdict) -> VerdictResource:
    results = [GoldenResultResource(inputs=one.inputs, answer=one.answer, reason=one.reason) for one in verdict.results]
    return VerdictResource(adapter=verdict.reference, passed=verdict.passed, results=results)


async def _canary(front: Front, name: str, alias: str) -> CanaryResource:
    canary, watch = await front.library.releases.canary(name, alias)
    return CanaryResource(
        name=name,
        alias=alias,
        version=canary.version,
        weights=weights_to_json(canary.weights),
        before=weights_to_json(canary.before),
        max_error_rate=canary.max_error_rate,
        min_requests=canary.min_requests,
        window=canary.window,
        state=str(canary.state),
        reason=canary.reason,
        started_at=canary.started_at,
        ended_at=canary.ended_at,
        requests=None if watch is None else watch.num_requests,
        failed=None if watch is None else watch.num_failed,
        error_rate=None if watch is None else watch.error_rate,
    )
