"""`GET /admin/v1/audit`: the last changes, and who made them."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query, Request
from pydantic import BaseModel

from server.api.audit import AuditResource
from server.api.documented import ADMIN
from server.api.guarded_route import admin, guarded_router
from server.api.service import Service

router = guarded_router(prefix="/admin/v1", tags=["Audit"])


class AuditList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AuditResource]


@router.get("/audit", summary="Who changed what", responses=ADMIN)
@admin
async def show_audit(
    request: Request,
    adapter: Annotated[str, Query(max_length=300, description="Only what concerns this adapter.")] = "",
    limit: Annotated[int, Query(ge=1, le=10000)] = 100,
) -> AuditList:
    """Youngest first. The log is a file of the store, and only ever grows."""
    service: Service = request.app.state.service
    return AuditList(data=await service.audit.tail(limit, adapter))
