"""`/metrics`: names, labels and shapes that dashboards and routers rely on."""

from __future__ import annotations

import json

from prometheus_client.parser import text_string_to_metric_families

from server.api.exposition import OTHER_LABEL, EngineCollector
from tests.api.conftest import Door, Visit

# What routers, autoscalers and the Grafana dashboard of vLLM ask for.
WIRE_NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:lora_requests_info",
    "vllm:cache_config_info",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_inference_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_max_num_generation_tokens_bucket",
    "vllm:iteration_tokens_total_bucket",
    "vllm:request_params_n_bucket",
    "vllm:request_params_max_tokens_bucket",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:num_requests_waiting_by_reason",
]


async def scrape(door: Door) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Sample name -> (labels, value), read as strictly as Prometheus reads."""
    answer = await door.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8", "no negotiation"
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def test_every_name_of_the_wire_protocol_is_there_before_the_first_request(visit: Visit) -> None:
    async def test(door: Door) -> None:
        found = await scrape(door)
        assert [name for name in WIRE_NAMES if name not in found] == []
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            assert found[name] == [({"model_name": "veneer-demo-base", "engine": "0"}, 0.0)], (
                "one series, whatever happens"
            )
        reasons = {labels["finished_reason"] for labels, _ in found["vllm:request_success_total"]}
        assert reasons == {"stop", "length", "abort", "error", "repetition"}
        assert not [name for name in found if name.endswith("_created")]

    visit(test)


def test_the_adapters_on_the_device_are_one_series_for_routers(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for name in ("pirate", "french"):
            await door.upload(name, config=json.dumps({"r": 4, "for": name}).encode())
            await door.client.post(f"/admin/v1/adapters/{name}/load")
        (labels, value), *rest = (await scrape(door))["vllm:lora_requests_info"]
        assert rest == []
        assert labels == {"max_lora": "7", "running_lora_adapters": "french,pirate", "waiting_lora_adapters": ""}
        assert value > 1e9

    visit(test, max_loras=7)


def test_the_wire_names_can_be_switched_off(visit: Visit) -> None:
    async def test(door: Door) -> None:
        found = await scrape(door)
        assert not [name for name in found if name.startswith("vllm:")]
        assert found["veneer_up"] == [({}, 1.0)]

    visit(test, metrics_compat="none")


def test_answers_are_counted_by_route_never_by_address(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for number in range(3):
            await door.client.get(f"/admin/v1/adapters/nobody{number}")
            await door.client.get(f"/made/up/{number}")
        counts = {(one["route"], one["status"]): n for one, n in (await scrape(door))["veneer_http_requests_total"]}
        assert counts[("/admin/v1/adapters/{name:path}", "404")] == 3
        assert counts[("unknown", "404")] == 3

    visit(test)


def test_a_bug_is_counted_and_answered(visit: Visit) -> None:
    async def test(door: Door) -> None:
        await door.generate("@bug")
        counts = {(one["route"], one["status"]): n for one, n in (await scrape(door))["veneer_http_requests_total"]}
        assert counts[("/generate", "500")] == 1

    visit(test)


def test_adapters_beyond_the_cap_share_a_series(visit: Visit) -> None:
    async def test(door: Door) -> None:
        for name in ("", "a", "b", "c", "d"):
            door.front.metrics.of_adapter(name).num_prompt_tokens = 1
        found = (await scrape(door))["veneer_adapter_prompt_tokens_total"]
        assert {labels["adapter"]: value for labels, value in found} == {
            "__base__": 1.0,
            "a": 1.0,
            "b": 1.0,
            OTHER_LABEL: 2.0,
        }

    visit(test, metrics_max_adapters=2)


def test_series_of_adapters_can_be_switched_off(visit: Visit) -> None:
    async def test(door: Door) -> None:
        door.front.metrics.of_adapter("a").num_prompt_tokens = 1
        assert "veneer_adapter_prompt_tokens_total" not in await scrape(door)

    visit(test, metrics_adapter_label="off")


def test_histograms_have_vllms_buckets(visit: Visit) -> None:
    async def test(door: Door) -> None:
        door.front.metrics.total_s.observe(0.4)
        found = await scrape(door)
        bounds = [labels["le"] for labels, _ in found["vllm:e2e_request_latency_seconds_bucket"]]
        assert bounds[:4] == ["0.3", "0.5", "0.8", "1.0"]
        assert bounds[-2:] == ["7680.0", "+Inf"]
        values = [value for _, value in found["vllm:e2e_request_latency_seconds_bucket"]]
        assert values[:3] == [0.0, 1.0, 1.0]
        assert found["vllm:e2e_request_latency_seconds_count"][0][1] == 1.0

    visit(test)


def test_without_a_front_the_door_still_answers(visit: Visit) -> None:
    async def test(door: Door) -> None:
        collector = EngineCollector(door.settings, None, is_healthy=False)
        assert {family.name for family in collector.collect()} == {"veneer_build_info", "veneer_up"}

    visit(test)
