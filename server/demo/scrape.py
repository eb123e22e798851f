"""The part of /metrics that the tour shows: each family on one line, with its meaning.

Running example: three samples of one family become
    ReadOut("veneer_adapter_requests_total", "json 15, pirate 12, shout 15", "requests by adapter")
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SAMPLE = re.compile(r"(?P<family>[a-zA-Z_:]\w*(?::\w+)?)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Explained(NamedTuple):
    meaning: str
    label: str | None = None  # the label that tells the family's samples apart
    is_told_by_label: bool = False  # the label's value is the news, and the number is not


EXPLAINED = {
    "veneer_generation_tokens_total": Explained("tokens generated for everyone"),
    "veneer_steps_total": Explained("forward passes, shared by all adapters"),
    "veneer_prefix_cache_hits_total": Explained("prompt tokens found in the cache"),
    "veneer_adapter_requests_total": Explained("requests by adapter", "adapter"),
    "veneer_adapter_device_loads_total": Explained("times an adapter was brought in"),
    "veneer_adapter_evictions_total": Explained("times one left it, by reason", "reason"),
    "veneer_adapter_cache_bytes": Explained("bytes that adapters hold now"),
    "vllm:lora_requests_info": Explained("resident now, for routers", "running_lora_adapters", True),
}


class ReadOut(NamedTuple):
    family: str
    value: str
    meaning: str


def read_out(text: str) -> list[ReadOut]:
    """The explained families that a scrape holds, in the order of EXPLAINED."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        sample = _SAMPLE.fullmatch(line)
        if sample is not None and sample["family"] in EXPLAINED:
            found.setdefault(sample["family"], []).append(_told(sample))
    return [ReadOut(name, ", ".join(found[name]), one.meaning) for name, one in EXPLAINED.items() if name in found]


def _told(sample: re.Match[str]) -> str:
    explained = EXPLAINED[sample["family"]]
    number = f"{float(sample['value']):,.0f}"
    if explained.label is None:
        return number
    label = dict(_LABEL.findall(sample["labels"] or "")).get(explained.label, "")
    return label if explained.is_told_by_label else f"{label} {number}"
