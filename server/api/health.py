"""Is it alive, can it serve, what is it: the routes that probes and clients ask before they send work.

/v2/health/live             200 as soon as the process answers (liveness: never fails while the base loads)
/health /ping /v2/health/ready   200 when a request would be served now, else 503 (readiness)
/info /version              what is served
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from server.api.caller import STRANGER, caller_of, num_visible
from server.api.documented import NOT_READY
from server.api.errors import Explanation, error_response
from server.api.guarded_route import guarded_router, public
from server.api.service import Service
from server.version import VERSION

router = guarded_router(tags=["Health"])


class Version(BaseModel):
    version: str


class ServerDescription(BaseModel):
    """What is served and with which limits; the names are those that text-generation clients know."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_input_length: int
    max_total_tokens: int
    max_batch_total_tokens: int
    max_client_batch_size: int
    max_top_n_tokens: int
    max_loras: int | None
    max_cpu_loras: int | None
    max_lora_rank: int | None
    router: str
    version: str
    num_adapters: int | None  # those that the caller's key sees; None without a key where keys have scopes


@router.get("/health", summary="Can a request be served now?", responses=NOT_READY, response_class=Response)
@public
async def health(request: Request) -> Response:
    """An empty 200, or 503 while the base loads, the engine restarts, or the server drains."""
    service: Service = request.app.state.service
    if service.is_healthy:
        return Response(status_code=200)
    return error_response(
        "/health", Explanation(503, "healthcheck", f"unhealthy: {service.unhealthy_reason}", "healthcheck", {})
    )


for _path, _method in (("/", "GET"), ("/ping", "GET"), ("/ping", "POST"), ("/v2/health/ready", "GET")):
    router.add_api_route(
        _path,
        health,
        methods=[_method],
        name=f"{_method.lower()}{_path.replace('/', '_')}",
        summary="The same as /health",
        responses=NOT_READY,
        response_class=Response,
    )


@router.get("/v2/health/live", summary="Is the process alive?", response_class=Response)
@public
async def live(request: Request) -> Response:
    return Response(status_code=200)


@router.get("/version", summary="The server's version")
@public
async def version(request: Request) -> Version:
    return Version(version=VERSION)


@router.get("/info", summary="What is served, and the limits", responses=NOT_READY)
@public
async def info(request: Request) -> ServerDescription:
    service: Service = request.app.state.service
    settings, front, caller = service.settings, service.front, caller_of(request)
    engine: Any = front.engine.description
    waiting_and_running = settings.max_num_seqs + settings.max_queued_requests
    return ServerDescription(
        model_id=settings.base_name,
        model_sha=settings.revision,
        model_dtype=f"torch.{engine.dtype}",
        model_device_type=engine.device,
        model_pipeline_tag="text-generation",
        max_concurrent_requests=settings.max_concurrent_requests or waiting_and_running,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_input_tokens=engine.max_model_len - 1,
        max_input_length=engine.max_model_len - 1,
        max_total_tokens=engine.max_model_len,
        max_batch_total_tokens=engine.num_units * engine.block_size,
        max_client_batch_size=1,
        max_top_n_tokens=settings.max_top_n_tokens,
        max_loras=settings.max_loras,
        max_cpu_loras=settings.max_cpu_loras,
        max_lora_rank=settings.max_lora_rank,
        router="veneer",
        version=VERSION,
        num_adapters=None if caller == STRANGER else num_visible(front.library, caller),
    )
