"""`GET /admin/v1/usage`: what every key has used of every adapter version, added up over all servers of the store.

A key that sees all adapters is told of all keys; any other of itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import date
from typing import Annotated, Literal

from fastapi import Query, Request
from pydantic import BaseModel

from server.api.caller import Caller, caller_of
from server.api.documented import ADMIN_ONE
from server.api.errors import AdminRefusal
from server.api.guarded_route import admin, guarded_router, scoped
from server.api.service import Service
from server.usage import Account, read_usage

router = guarded_router(prefix="/admin/v1", tags=["Observing"])


class UsageResource(BaseModel):
    object: Literal["usage"] = "usage"
    key: str  # its name; "" for callers without one
    adapter: str | None  # None is the base
    version: int | None
    requests: int
    unfinished: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


class UsageList(BaseModel):
    object: Literal["list"] = "list"
    data: list[UsageResource]


@router.get("/usage", summary="Tokens by key and adapter version", responses=ADMIN_ONE)
@admin
@scoped
async def usage(
    request: Request,
    since: Annotated[date | None, Query(description="First day, in UTC.")] = None,
    until: Annotated[date | None, Query(description="Last day, in UTC.")] = None,
    key: Annotated[str | None, Query(max_length=100, description="Name of a key.")] = None,
    adapter: Annotated[str | None, Query(max_length=300)] = None,
) -> UsageList:
    """A request is counted when it has ended, with the tokens that were sent; it shows up within a second."""
    service: Service = request.app.state.service
    if service.ledger is None:
        raise AdminRefusal(404, "no_usage_ledger", "this server keeps no usage ledger; start it with --usage-ledger")
    caller = caller_of(request)
    totals = await asyncio.to_thread(read_usage, service.ledger.directory, since, until)
    wanted = [account for account in sorted(totals) if _is_wanted(account, caller, key, adapter)]
    return UsageList(
        data=[
            UsageResource(
                key=account.key,
                adapter=account.adapter or None,
                version=account.version or None,
                **asdict(totals[account]),
            )
            for account in wanted
        ]
    )


def _is_wanted(account: Account, caller: Caller, key: str | None, adapter: str | None) -> bool:
    is_own = caller.sees_all or account.key == caller.name
    return is_own and key in (None, account.key) and adapter in (None, account.adapter)
