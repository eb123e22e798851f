"""Which adapters there are, where they come from, and what is refused of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from server.setting_groups.field import SettingGroup, setting
from server.setting_groups.values import AdapterPatterns, Address, LoraModule, LoraModules, Networks, Paths, Size, Words


class AdapterSettings(SettingGroup):
    heading = "Adapters"

    adapters_dir: Path | None = setting(
        None,
        "Directory whose subdirectories (adapter_config.json inside) are registered at start by name. "
        "Default: the adapters of the built-in base, when that is served.",
    )
    watch_adapters_dir_s: float = setting(
        10.0, "Seconds between looks at --adapters-dir for what was dropped into it; 0: none.", ge=0
    )
    keep_versions: int | None = setting(
        None, "Newest versions to keep of an adapter, besides pinned and aliased ones. Default: all.", gt=0
    )
    store_dir: Path | None = setting(None, "Where uploaded adapters are kept. Default: $XDG_DATA_HOME/veneer/store.")
    lora_modules: LoraModules = setting(
        (),
        'Adapters to register at start: NAME=PATH or {"name": ..., "path": ...}, several may follow; a path is a '
        "directory, or a source as org/repo@revision, s3://bucket/folder.",
        metavar="NAME=PATH",
    )
    adapter_roots: Paths = setting(
        (),
        "Directory below which the admin routes may name adapters by path, besides --adapters-dir; repeatable.",
        metavar="DIRECTORY",
    )
    hub_endpoint: Address | None = setting(
        None, "Address of the Hub that adapters are fetched from. Default: $HF_ENDPOINT.", metavar="URL"
    )
    offline: bool = setting(
        False,
        "Fetch no adapter over the network; of the Hub, take what its local cache holds. $HF_HUB_OFFLINE does it too.",
    )
    https_sources: Words = setting(
        (),
        "Host that adapters may be fetched from by https://, e.g. models.example or *.example; repeatable. "
        "Default: none.",
        metavar="HOST",
    )
    https_source_networks: Networks = setting(
        (),
        "Network (as 10.1.0.0/16) that is not public and may be reached by https:// all the same; repeatable.",
        metavar="CIDR",
    )
    adapter_auto_load: AdapterPatterns = setting(
        (),
        "Fetch an unknown adapter from the Hub when a request names it and it matches, e.g. org/sql-*; repeatable.",
        metavar="ORG/PATTERN",
    )
    enable_lora: bool = setting(True, "Accepted for vLLM's command lines; adapters are always on.")
    max_loras: int | None = setting(
        None,
        "Number of adapters that routers may assume fit at once (told in /info and vllm:lora_requests_info). "
        "Nothing is limited by it: memory is bounded in bytes.",
        gt=0,
    )
    max_cpu_loras: int | None = setting(
        None, "As --max-loras for host memory; told in /info. Nothing is limited by it.", gt=0
    )
    max_lora_rank: int | None = setting(None, "Refuse adapters of a higher rank. Default: any rank is served.", gt=0)
    max_dense_adapter_bytes: Size = setting(
        256 * 2**20,
        "Refuse adapters whose changes are whole matrices of more bytes together, in float32.",
        ge=0,
        metavar="SIZE",
    )
    probe_adapters: bool = setting(True, "Measure how far a new adapter moves the base, by one short prompt on both.")
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Type adapters are kept in on the device: auto is the base's, float32 is exact at twice the bytes.",
        aliases=("--lora-dtype",),
    )
    allow_runtime_lora_updating: bool = setting(
        False, "Open vLLM's /v1/load_lora_adapter and its like; so does $VLLM_ALLOW_RUNTIME_LORA_UPDATING."
    )
    image_cache_bytes: Size = setting(
        64 * 2**30,
        "Most that packed images in the store may take on disk; those unused longest go first, and are packed again "
        "when needed.",
        gt=0,
        metavar="SIZE",
    )
    max_upload_bytes: Size = setting(
        2 * 2**30, "Largest upload of one adapter version, all files together.", gt=0, metavar="SIZE"
    )

    @field_validator("enable_lora")
    @classmethod
    def _adapters_cannot_be_switched_off(cls, value: bool) -> bool:
        if not value:
            raise ValueError("adapters are always on in this server; requests that name none run on the bare base")
        return value

    @field_validator("lora_modules")
    @classmethod
    def _names_come_once(cls, value: tuple[LoraModule, ...]) -> tuple[LoraModule, ...]:
        names = [module.name for module in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the name {twice[0]!r} is given twice; give every adapter a name of its own")
        return value
