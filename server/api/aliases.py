"""Aliases over HTTP: which version a name means, for everybody or by weight, and back.

    GET    /admin/v1/adapters/{name}/aliases/{alias}            what it means, and what it meant before
    PUT    /admin/v1/adapters/{name}/aliases/{alias}            {"version": 3} or {"weights": {"3": 90, "4": 10}}
    DELETE /admin/v1/adapters/{name}/aliases/{alias}
    POST   /admin/v1/adapters/{name}/aliases/{alias}/rollback   what it meant before, in one call

The alias `default` is what the bare name means. Every move is atomic: a request sees the old meaning or the new one,
and ends on the version it began with. `If-Match` with the adapter's `ETag` makes a move conditional.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Body, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters_store.alias import Alias, weights_to_json
from adapters_store.errors import AliasNotFound
from adapters_store.names import check_alias, check_name
from server.api.adapter_view import Name, front_of, tagged_adapter
from server.api.audit import changed
from server.api.documented import ADMIN_CHANGE, ADMIN_ONE, Responses
from server.api.errors import Invalid
from server.api.guarded_route import admin, conditional, guarded_router
from server.api.preconditions import Precondition
from server.api.resources import AdapterResource
from server.front.front import Front

router = guarded_router(prefix="/admin/v1", tags=["Aliases"])
AliasName = Annotated[str, Path(max_length=100)]
SkipGate = Annotated[bool, Query(description="Move it without asking the golden prompts; the audit log says so.")]
_ADDRESS = "/adapters/{name:path}/aliases/{alias}"
_MOVED: Responses = {**ADMIN_CHANGE, 200: {"description": "The adapter, moved.", "model": AdapterResource}}
_GONE: Responses = {**ADMIN_CHANGE, 204: {"description": "The alias is gone."}}


class AliasOrder(BaseModel):
    """One version for everybody, or several by weight."""

    model_config = ConfigDict(
        strict=True, extra="forbid", json_schema_extra={"examples": [{"version": 3}, {"weights": {"3": 90, "4": 10}}]}
    )

    version: int | None = Field(None, ge=1, lt=10**9)
    weights: dict[str, int] | None = Field(None, description="Version -> share, relative to the sum of all.")

    @model_validator(mode="after")
    def _is_one_of_both(self) -> AliasOrder:
        if (self.version is None) == (self.weights is None):
            raise ValueError("give `version` for one version, or `weights` for several")
        return self

    def to_weights(self) -> dict[int, int]:
        """Raises Invalid for a key that is no version's number."""
        if self.version is not None:
            return {self.version: 1}
        assert self.weights is not None
        wrong = next((key for key in self.weights if not (key.isascii() and key.isdecimal() and len(key) < 10)), None)
        if wrong is not None:
            raise Invalid(f"`weights`: {wrong[:40]!r} is no version's number")
        return {int(key): share for key, share in self.weights.items()}


class MeaningResource(BaseModel):
    weights: dict[str, int]
    until: str = Field(description="When it was moved away.")


class AliasResource(BaseModel):
    object: Literal["adapter.alias"] = "adapter.alias"
    name: str
    alias: str
    weights: dict[str, int] = Field(description="Version -> share, relative to the sum of all.")
    gated: bool = Field(description="Whether golden prompts stand before a move.")
    history: list[MeaningResource] = Field(description="What it meant before, newest first.")


@router.get(_ADDRESS, summary="Show an alias", responses=ADMIN_ONE)
@admin
async def show_alias(request: Request, name: Name, alias: AliasName) -> AliasResource:
    front = front_of(request)
    found = _alias(front, check_name(name), check_alias(alias))
    return AliasResource(
        name=name,
        alias=alias,
        weights=weights_to_json(found.weights),
        gated=await front.library.releases.gate(name, alias) is not None,
        history=[MeaningResource(weights=weights_to_json(move.weights), until=move.until) for move in found.history],
    )


@router.put(_ADDRESS, summary="Point an alias to a version, or to several by weight", responses=_MOVED)
@admin
@conditional
async def set_alias(
    request: Request, name: Name, alias: AliasName, order: Annotated[AliasOrder, Body()], skip_gate: SkipGate = False
) -> Response:
    """Where several share it, requests with the same `sticky_key` get the same version, the others by chance."""
    front, precondition = front_of(request), Precondition.of(request.headers)
    weights, before = order.to_weights(), _meaning(front, check_name(name), alias)
    await front.library.releases.move(name, alias, weights, expect=precondition.check, skip_gate=skip_gate)
    detail = {"skip_gate": True} if skip_gate else {}
    changed(request, "alias.set", f"{name}@{alias}", before=before, after=weights_to_json(weights), **detail)
    return await tagged_adapter(front, name)


@router.post(_ADDRESS + "/rollback", summary="Give an alias back its earlier meaning", responses=_MOVED)
@admin
@conditional
async def roll_back_alias(request: Request, name: Name, alias: AliasName) -> Response:
    """Its newest earlier meaning whose versions are all still there. Twice goes back two moves."""
    front, precondition = front_of(request), Precondition.of(request.headers)
    before = _meaning(front, check_name(name), alias)
    restored = await front.library.releases.roll_back(name, alias, expect=precondition.check)
    changed(request, "alias.rollback", f"{name}@{alias}", before=before, after=weights_to_json(restored.weights))
    return await tagged_adapter(front, name)


@router.delete(_ADDRESS, summary="Forget an alias", status_code=204, responses=_GONE, response_class=Response)
@admin
@conditional
async def remove_alias(request: Request, name: Name, alias: AliasName) -> Response:
    """The versions stay. Without `default` the bare name means the latest version."""
    front, precondition = front_of(request), Precondition.of(request.headers)
    before = _meaning(front, check_name(name), alias)
    await front.library.releases.remove(name, alias, expect=precondition.check)
    changed(request, "alias.delete", f"{name}@{alias}", before=before)
    return Response(status_code=204)


def _alias(front: Front, name: str, alias: str) -> Alias:
    found = front.library.catalog.record(name).routes.get(alias)
    if found is None:
        raise AliasNotFound(f"adapter {name!r} has no alias {alias!r}.")
    return found


def _meaning(front: Front, name: str, alias: str) -> dict[str, int] | None:
    """What an alias means now, for the audit log. Raises AdapterNotFound."""
    found = front.library.catalog.record(name).routes.get(alias)
    return None if found is None else weights_to_json(found.weights)
