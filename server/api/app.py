"""The ASGI application: every route, the doorstep before them and the error handlers behind them.

app = create_app(settings, front)      # ready at once: tests, embedding
app = create_app(settings)             # answers 503 until `app.state.service.attach(front)`
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from server.api import (
    adapters,
    aliases,
    audits,
    blobs,
    canaries,
    errors,
    generate,
    health,
    operations,
    residency,
    runtime_updates,
    scrape,
    upload_archive,
    uploads,
    usage,
)
from server.api.doorstep import Doorstep
from server.api.guarded_route import GuardedRoute
from server.api.service import Service
from server.api.sse import ClientGone
from server.front.front import Front
from server.settings import Settings
from server.version import VERSION

_DESCRIPTION = """One frozen base model and any number of adapters on it. A request names its adapter; requests on
different adapters share one forward pass. Errors of the native routes are `{"error", "error_type"}`; those of `/admin`
are `{"error": {"message", "type", "param", "code"}}`."""
# Those with a suffix behind an adapter's name stand before those whose paths end with the name.
ROUTERS = (
    generate.router,
    health.router,
    scrape.router,
    operations.router,
    audits.router,
    usage.router,
    uploads.router,
    blobs.router,
    canaries.router,
    aliases.router,
    residency.router,
    runtime_updates.router,
    adapters.router,
    upload_archive.router,
)
_CLIENT_CLOSED_REQUEST = 499  # never seen by anybody: the connection is gone
_ALLOWED_HEADERS = (
    "Authorization",
    "Content-Type",
    "X-Request-Id",
    "X-Sticky-Key",
    "If-Match",
    "If-None-Match",
    "Idempotency-Key",
)
_EXPOSED_HEADERS = (
    "x-request-id",
    "x-adapter-id",
    "x-adapter-version",
    "x-veneer-ignored-fields",
    "retry-after",
    "etag",
    "location",
    "idempotent-replayed",
)


def create_app(settings: Settings, front: Front | None = None) -> FastAPI:
    """Build the application; it starts and stops nothing by itself."""
    service = Service(settings, front)
    app = FastAPI(
        title="Veneer",
        version=VERSION,
        description=_DESCRIPTION,
        openapi_url="/openapi.json" if settings.enable_docs else None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.router.route_class = GuardedRoute
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app)
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    if settings.cors_allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_allow_origin),
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=list(_ALLOWED_HEADERS),
            expose_headers=list(_EXPOSED_HEADERS),
        )
    app.add_middleware(Doorstep, service=service)
    return app


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
