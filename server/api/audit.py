"""Who changed what: every admin request that changed something leaves a line in the store, and a route reads them.

    GET /admin/v1/audit?adapter=sql&limit=100     youngest first

The route of every change is a `GuardedRoute`, and that is where lines are written, so no admin route can be forgotten.
A route says what it did with `changed`, as soon as it is done: should the request fail after that, the line says so.
One that changed nothing says `unchanged`. What happens without a request has a line as well, with another actor:

    time to live, retention    the caretaker deleted it          canary       it was rolled back by itself
    adapters directory         it was found there                auto load    a request named it
    start                      a setting named it                fsck, restore    the command line
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from fastapi import Request, Response
from pydantic import BaseModel

from adapters_store.alias import weights_to_json
from adapters_store.alias_rules import AliasKey
from adapters_store.audit_log import AuditEntry, AuditLog
from server.api.caller import caller_of
from server.api.errors import explain
from server.api.operation import Operation
from server.library.canary import Canary

_LOCATION = "/admin/v1/adapters/"
Change = tuple[str, str, dict[str, Any]]  # (action, target, detail)


class AuditResource(BaseModel):
    object: Literal["audit.entry"] = "audit.entry"
    at: str
    actor: str
    action: str
    target: str
    detail: dict[str, Any]
    request_id: str | None


class Audit:
    """The log of one server's store; before it is open no request changes anything."""

    def __init__(self) -> None:
        self._log: AuditLog | None = None

    def open(self, root: Path) -> None:
        self._log = AuditLog(root)

    async def note(self, request: Request, response: Response, endpoint: str) -> None:
        """One line for a request that changed something; none if nothing changed or the work is only accepted."""
        change = getattr(request.state, "change", None)
        if change is None and response.status_code < 300:  # a route that forgot to say anything
            change = (endpoint, _target(request, response), {})
        if change and response.status_code != 202:
            await self._note(request, change, None if response.status_code < 300 else str(response.status_code))

    async def note_failure(self, request: Request, error: Exception) -> None:
        """One line for a request that failed, if it had changed something before."""
        change = getattr(request.state, "change", None)
        if change:
            await self._note(request, change, _code(error))

    async def note_operation(self, operation: Operation, error: Exception | None) -> None:
        """One line for work in the background that has changed something, and how it ended."""
        detail = {"operation": operation.id, **operation.changed}
        if error is not None:
            detail["failed"] = _code(error)
        await self.write(AuditEntry(operation.actor, operation.kind, operation.target, detail))

    async def _note(self, request: Request, change: Change, failed: str | None) -> None:
        action, target, detail = change
        if failed is not None:
            detail = {**detail, "failed": failed}
        actor = caller_of(request).name or "no key"
        await self.write(AuditEntry(actor, action, target, detail, request.state.request_id))

    async def note_canary(self, key: AliasKey, canary: Canary) -> None:
        """One line for a canary that ended by itself."""
        detail = {"version": canary.version, "reason": canary.reason, "after": weights_to_json(canary.before)}
        await self.write(AuditEntry("canary", f"canary.{canary.state}", str(key), detail))

    async def write(self, entry: AuditEntry) -> None:
        """The change has happened, so a line that cannot be written stops nothing; it is told as an error."""
        if self._log is not None:
            await asyncio.to_thread(self._log.note, entry)

    async def tail(self, limit: int, adapter: str) -> list[AuditResource]:
        """The last lines, youngest first; of one adapter, unless `adapter` is empty."""
        if self._log is None:
            return []
        entries = await asyncio.to_thread(self._log.tail, limit, target=adapter)
        return [
            AuditResource(
                at=entry.at,
                actor=entry.actor,
                action=entry.action,
                target=entry.target,
                detail=entry.detail,
                request_id=entry.request_id,
            )
            for entry in entries
        ]


def changed(request: Request, action: str, target: str, **detail: Any) -> None:
    """What the audit log says of this request. The last one counts, so that a request may say more as it goes."""
    request.state.change = (action, target, detail)


def unchanged(request: Request) -> None:
    """This request changed nothing that lasts."""
    request.state.change = ()


def _code(error: Exception) -> str:
    told = explain(error)
    return "internal" if told is None else told.code


def _target(request: Request, response: Response) -> str:
    """The adapter that a path names, or that the answer says where to find."""
    name = request.path_params.get("name")
    version = request.path_params.get("version") or request.path_params.get("alias")
    if name is None:
        location = response.headers.get("location", "")
        name, _, version = unquote(location.removeprefix(_LOCATION)).partition("/versions/")
    return f"{name}@{version}" if version else str(name)
