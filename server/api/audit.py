"""Who changed what: every admin request that changed something leaves a line in the store, and a route reads them.

    GET /admin/v1/audit?adapter=sql&limit=100     youngest first

The route of every change is a `GuardedRoute`, and that is where lines are written, so no admin route can be forgotten.
A route that knows more than its name and its path says so with `changed`; one that changed nothing says `unchanged`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from fastapi import Request, Response
from pydantic import BaseModel

from adapters_store.alias import weights_to_json
from adapters_store.alias_rules import AliasKey
from adapters_store.audit_log import AuditEntry, AuditLog
from adapters_store.errors import DiskFull
from server.api.caller import caller_of
from server.api.operation import Operation
from server.library.canary import Canary

log = logging.getLogger("veneer.http")
_LOCATION = "/admin/v1/adapters/"


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
        """One line for a request that a route answered with a success; none if nothing changed or is only accepted."""
        change = getattr(request.state, "change", None)
        if response.status_code == 202 or change == ():
            return
        action, target, detail = change or (endpoint, _target(request, response), {})
        actor = caller_of(request).name or "no key"
        await self.write(AuditEntry(actor, action, target, detail, request.state.request_id))

    async def note_operation(self, operation: Operation, result: Mapping[str, Any]) -> None:
        """One line for work in the background that succeeded."""
        version = result.get("version")
        detail = {"operation": operation.id} | ({} if version is None else {"version": version})
        await self.write(AuditEntry(operation.actor, operation.kind, operation.target, detail))

    async def note_canary(self, key: AliasKey, canary: Canary) -> None:
        """One line for a canary that ended by itself."""
        detail = {"version": canary.version, "reason": canary.reason, "after": weights_to_json(canary.before)}
        await self.write(AuditEntry("canary", f"canary.{canary.state}", str(key), detail))

    async def write(self, entry: AuditEntry) -> None:
        """The change has happened, so a line that cannot be written stops nothing; it is told as an error."""
        try:
            if self._log is not None:
                await asyncio.to_thread(self._log.append, entry)
        except (OSError, DiskFull) as error:
            log.error("the audit log could not be written (%s): %s", error, entry)

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
    """What the audit log says of this request, once it has succeeded."""
    request.state.change = (action, target, detail)


def unchanged(request: Request) -> None:
    """This request changed nothing that lasts."""
    request.state.change = ()


def _target(request: Request, response: Response) -> str:
    """The adapter that a path names, or that the answer says where to find."""
    name = request.path_params.get("name")
    version = request.path_params.get("version") or request.path_params.get("alias")
    if name is None:
        location = response.headers.get("location", "")
        name, _, version = unquote(location.removeprefix(_LOCATION)).partition("/versions/")
    return f"{name}@{version}" if version else str(name)
