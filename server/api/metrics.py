"""What is counted at the door. How requests fare is counted behind it, by the front and by the engine's client."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics


class DoorMetrics:
    """The counters of one HTTP server, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.http_requests = Counter(
            "veneer_http_requests", "Answers by route and status.", ("route", "status"), registry=self.registry
        )
        self.ignored_fields = Counter(
            "veneer_ignored_fields", "Unknown body fields that were told as ignored.", registry=self.registry
        )
        self.refused = Counter(
            "veneer_requests_refused", "Requests refused or failed, by error type.", ("type",), registry=self.registry
        )
        self.upload_bytes = Counter("veneer_upload_bytes", "Bytes of adapter files received.", registry=self.registry)
