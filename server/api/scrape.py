"""`GET /metrics`: plain text, without content negotiation.

An OpenMetrics answer would rename `vllm:x` to `vllm_x` and blank the dashboards that read it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from fastapi import Request, Response
from prometheus_client import generate_latest
from prometheus_client.core import Metric

from server.api.caller import Caller, caller_of, visible_names
from server.api.exposition import EngineCollector, Snapshot
from server.api.guarded_route import guarded_router, public
from server.api.service import Service
from server.engine.errors import EngineUnavailable
from server.engine.request import AdapterState, ResidentAdapter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_WAIT_S = 2.0  # a scrape must not hang with a busy engine
router = guarded_router(tags=["Observing"])


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
@public
async def metrics(request: Request) -> Response:
    """Counters, histograms and gauges as text: `veneer_*` and, unless switched off, the `vllm:*` names.

    Adapters become labels as far as the caller's key sees them. With a keys file, scrape with a key that may read all.
    """
    service: Service = request.app.state.service
    collector = EngineCollector(service.settings, await _snapshot(service, caller_of(request)), service.is_healthy)
    text = generate_latest(service.metrics.registry) + generate_latest(_Once(collector))
    return Response(text, headers={"content-type": CONTENT_TYPE})


async def _snapshot(service: Service, caller: Caller) -> Snapshot | None:
    front = service.front_or_none
    if front is None:
        return None
    residents: list[ResidentAdapter] = []
    with contextlib.suppress(EngineUnavailable, TimeoutError):
        residents = await asyncio.wait_for(front.engine.residency(), _MAX_WAIT_S)
    numbers = {str(state): number for state, number in front.library.num_by_state().items()}
    on_device = [adapter for adapter in residents if adapter.state is AdapterState.DEVICE]
    return Snapshot(
        stats=front.engine.stats(),
        engine=front.engine.metrics,
        requests=front.metrics,
        resident=tuple(visible_names(caller, front.library.catalog.names_using(adapter.key for adapter in on_device))),
        num_adapters=numbers if caller.sees_all else {},
        adapter_bytes=sum(adapter.num_bytes for adapter in on_device),
        sees=caller.sees,
        block_size=front.engine.description.block_size,
        num_restarts=front.engine.num_restarts,
    )


class _Once:
    """A registry of one collector, for one scrape."""

    def __init__(self, collector: EngineCollector) -> None:
        self._collector = collector

    def collect(self) -> Iterator[Metric]:
        return self._collector.collect()
