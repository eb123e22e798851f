"""What `GET /metrics` tells of the engine, the requests and the adapters, as prometheus families.

The names starting with `vllm:` are a wire protocol here: dashboards, routers and autoscalers read them, so spelling,
labels and buckets are those of vLLM 0.33. Our own names start with `veneer_`. Every gauge that routers read has exactly
one series. Only names of registered adapters that the caller sees become label values, at most `metrics_max_adapters`
of them; the others share "__other__", so that no client can fill the memory of a Prometheus.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from server.api import metric_names as names
from server.engine.metrics import AdapterCounts, EngineMetrics, Histogram, RequestMetrics
from server.engine.stats import EngineStats
from server.settings import Settings
from server.version import VERSION

BASE_LABEL = "__base__"
OTHER_LABEL = "__other__"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one scrape found."""

    stats: EngineStats
    engine: EngineMetrics
    requests: RequestMetrics
    resident: tuple[str, ...]  # names of adapters on the device, without versions, sorted
    num_adapters: Mapping[str, int]  # state -> registered adapters
    adapter_bytes: int  # on the device
    block_size: int  # tokens
    num_restarts: int
    sees: Callable[[str], bool]  # whether an adapter's name may be told

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of adapters with requests in flight that are not on the device."""
        busy = {name for name, counts in self.requests.adapters.items() if name and counts.num_in_flight}
        return tuple(sorted(filter(self.sees, busy - set(self.resident))))


class EngineCollector:
    """One scrape's families, for `generate_latest`."""

    def __init__(self, settings: Settings, snapshot: Snapshot | None, is_healthy: bool) -> None:
        self._settings = settings
        self._snapshot = snapshot
        self._is_healthy = is_healthy

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("veneer_build_info", "1, with the version.", labels=("version",))
        build.add_metric((VERSION,), 1)
        yield build
        yield GaugeMetricFamily("veneer_up", "1 when requests are served.", value=int(self._is_healthy))
        if self._snapshot is None:
            return
        yield from _of_engine(self._snapshot)
        if self._settings.metrics_adapter_label == "counters":
            yield from _of_adapters(self._snapshot, self._settings.metrics_max_adapters)
        if self._settings.metrics_compat == "vllm":
            yield from _vllm(self._snapshot, self._settings)


def _of_engine(snapshot: Snapshot) -> Iterator[Metric]:
    for name, attribute, text in names.OWN_GAUGES:
        yield GaugeMetricFamily("veneer_" + name, text, value=getattr(snapshot.stats, attribute))
    for name, attribute, text in names.OWN_COUNTERS:
        yield CounterMetricFamily("veneer_" + name, text, value=getattr(snapshot.stats, attribute))
    yield _by_label("veneer_adapters", "Registered adapters by state.", "state", snapshot.num_adapters)
    yield _by_label(
        "veneer_adapter_cache_bytes", "Bytes of adapters on the device.", "tier", {"device": snapshot.adapter_bytes}
    )
    evictions = CounterMetricFamily(
        "veneer_adapter_evictions", "Adapters that left the device.", labels=("tier", "reason")
    )
    for reason, number in sorted(snapshot.stats.total_adapter_evictions.items()):
        evictions.add_metric(("device", reason), number)
    yield evictions
    yield CounterMetricFamily(
        "veneer_engine_restarts", "Times the engine was started anew.", value=snapshot.num_restarts
    )
    yield CounterMetricFamily(
        "veneer_requests_rejected", "Requests told that the queue is full.", value=snapshot.requests.num_rejected
    )
    yield _histogram("veneer_batch_adapters", "Distinct adapters in a step.", {}, snapshot.engine.step_adapters)


def _of_adapters(snapshot: Snapshot, max_adapters: int) -> Iterator[Metric]:
    outcomes = CounterMetricFamily(
        "veneer_adapter_requests", "Requests by adapter and how they ended.", labels=("adapter", "outcome")
    )
    prompt = CounterMetricFamily("veneer_adapter_prompt_tokens", "Prompt tokens by adapter.", labels=("adapter",))
    generated = CounterMetricFamily(
        "veneer_adapter_generation_tokens", "Generated tokens by adapter.", labels=("adapter",)
    )
    in_flight = GaugeMetricFamily(
        "veneer_adapter_requests_in_flight", "Requests in the house by adapter.", labels=("adapter",)
    )
    for label, counts in _grouped(snapshot, max_adapters).items():
        for outcome in sorted({outcome for each in counts for outcome in each.outcomes}):
            outcomes.add_metric((label, outcome), sum(each.outcomes[outcome] for each in counts))
        prompt.add_metric((label,), sum(each.num_prompt_tokens for each in counts))
        generated.add_metric((label,), sum(each.num_generated_tokens for each in counts))
        in_flight.add_metric((label,), sum(each.num_in_flight for each in counts))
    yield from (outcomes, prompt, generated, in_flight)


def _grouped(snapshot: Snapshot, max_adapters: int) -> dict[str, list[AdapterCounts]]:
    """Counts by label: the first `max_adapters` names seen have their own, in the order they were first used."""
    groups: dict[str, list[AdapterCounts]] = {}
    num_named = 0
    for name, counts in snapshot.requests.adapters.items():
        is_named = name != "" and num_named < max_adapters and snapshot.sees(name)
        label = BASE_LABEL if name == "" else name if is_named else OTHER_LABEL
        num_named += is_named
        groups.setdefault(label, []).append(counts)
    return groups


def _vllm(snapshot: Snapshot, settings: Settings) -> Iterator[Metric]:
    labels = {"model_name": settings.base_name, "engine": "0"}
    for name, attribute, text in names.VLLM_GAUGES:
        yield _single(
            GaugeMetricFamily("vllm:" + name, text, labels=tuple(labels)), labels, getattr(snapshot.stats, attribute)
        )
    for name, attribute, text in names.VLLM_COUNTERS:
        yield _single(
            CounterMetricFamily("vllm:" + name, text, labels=tuple(labels)), labels, getattr(snapshot.stats, attribute)
        )
    deferred = snapshot.stats.num_waiting_for_adapter
    yield _by_label(
        "vllm:num_requests_waiting_by_reason",
        "Waiting requests by reason; deferred ones wait for their adapter.",
        "reason",
        {"capacity": snapshot.stats.num_waiting - deferred, "deferred": deferred},
        labels,
    )
    for name, attribute, text in names.VLLM_ENGINE_HISTOGRAMS:
        yield _histogram("vllm:" + name, text, labels, getattr(snapshot.engine, attribute))
    for name, attribute, text in names.VLLM_REQUEST_HISTOGRAMS:
        yield _histogram("vllm:" + name, text, labels, getattr(snapshot.requests, attribute))
    success = CounterMetricFamily(
        "vllm:request_success", "Requests by how they ended.", labels=(*labels, "finished_reason")
    )
    for reason, outcomes in names.VLLM_FINISHED_REASONS.items():
        number = sum(snapshot.requests.outcomes[outcome] for outcome in outcomes)
        success.add_metric((*labels.values(), reason), number)
    yield success
    shape = {"block_size": str(snapshot.block_size), "num_gpu_blocks": str(snapshot.stats.num_units), "engine": "0"}
    yield _single(
        GaugeMetricFamily("vllm:cache_config_info", "1, with the cache's shape.", labels=tuple(shape)), shape, 1
    )
    yield _lora_info(snapshot, settings)


def _lora_info(snapshot: Snapshot, settings: Settings) -> Metric:
    """Bytes and not slots decide how many adapters fit, so `max_lora` is a number that routers may count on."""
    capacity = settings.max_loras or max(settings.max_num_seqs, len(snapshot.resident))
    labels = {
        "max_lora": str(capacity),
        "running_lora_adapters": ",".join(snapshot.resident),
        "waiting_lora_adapters": ",".join(snapshot.waiting),
    }
    family = GaugeMetricFamily(
        "vllm:lora_requests_info", "Adapters on the device, and waited for.", labels=tuple(labels)
    )
    return _single(family, labels, time.time())


def _single(family: Metric, labels: Mapping[str, str], value: float) -> Metric:
    family.add_metric(tuple(labels.values()), value)  # type: ignore[attr-defined]
    return family


def _by_label(
    name: str, text: str, label: str, numbers: Mapping[str, float], labels: Mapping[str, str] | None = None
) -> Metric:
    fixed = labels or {}
    family = GaugeMetricFamily(name, text, labels=(*fixed, label))
    for value, number in sorted(numbers.items()):
        family.add_metric((*fixed.values(), value), number)
    return family


def _histogram(name: str, text: str, labels: Mapping[str, str], histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text, labels=tuple(labels))
    buckets = [(_bound(bound), count) for bound, count in histogram.cumulated()]
    family.add_metric(tuple(labels.values()), buckets, histogram.total)
    return family


def _bound(value: float) -> str:
    return "+Inf" if value == float("inf") else str(float(value))
