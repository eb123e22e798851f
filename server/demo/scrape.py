"""The lines of /metrics that the tour shows, and what they mean in one clause each."""

from __future__ import annotations

from typing import NamedTuple

EXPLAINED = {
    "veneer_generation_tokens_total": "tokens generated for everyone",
    "veneer_steps_total": "forward passes they took: many sequences share a step",
    "veneer_prefix_cache_hits_total": "prompt tokens that did not have to be computed again",
    "veneer_adapter_device_loads_total": "times an adapter was brought to the device",
    "veneer_adapter_evictions_total": "times one left it, and why",
    "veneer_adapter_cache_bytes": "bytes that adapters hold there now",
    "veneer_adapter_requests_total": "requests of each adapter, by outcome",
    "vllm:lora_requests_info": "what routers read to send a request where its adapter is",
}


class Sample(NamedTuple):
    family: str
    name: str  # with labels
    value: str


def samples(text: str) -> list[Sample]:
    """The explained samples of one scrape, in the order of EXPLAINED."""
    found: list[Sample] = []
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        family = name.partition("{")[0]
        if family in EXPLAINED:
            found.append(Sample(family, name, f"{float(value):,.0f}"))
    order = list(EXPLAINED)
    return sorted(found, key=lambda sample: order.index(sample.family))
