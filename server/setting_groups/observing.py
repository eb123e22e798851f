"""What the server tells of itself."""

from __future__ import annotations

from typing import Literal

from server.setting_groups.field import SettingGroup, setting


class ObservingSettings(SettingGroup):
    heading = "Observing"

    metrics_compat: Literal["vllm", "none"] = setting(
        "vllm", "Names besides veneer_* in /metrics: vllm adds those that its dashboards and routers read."
    )
    metrics_adapter_label: Literal["off", "counters"] = setting("counters", "Whether counters per adapter are kept.")
    metrics_max_adapters: int = setting(
        100, 'Adapters with series of their own; the others share adapter="__other__".', ge=0
    )
    usage_ledger: bool = setting(True, "Keep in the store how many tokens every key had of every adapter version.")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "What is worth a log line.")
    access_log: bool = setting(False, "One log line per HTTP request.")
    enable_docs: bool = setting(True, "Serve /docs and /openapi.json.")
