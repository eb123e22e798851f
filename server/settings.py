"""Every setting of the server, once: flags, environment, config file, `--help` and the README table come from here.

A field's description is the flag's help text; its group is the heading it stands under; its aliases are spellings
that other servers use. `server.flags` turns the fields into a command line and layers the sources. This file knows no
source and no process: it says which values exist and which are refused.

Running example: `VENEER_PORT=9000 veneer serve ./llama --max-num-seqs 64`
    settings.model == "./llama"     from the command line
    settings.port  == 9000          from the environment
    settings.bind_host == "127.0.0.1"   no key is set, so nothing beyond this machine is served
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from server.demo import BASE_NAME
from server.limits import cpu_limit
from server.setting_values import (
    AdapterPatterns,
    Address,
    LoraModule,
    LoraModules,
    Networks,
    Paths,
    Secrets,
    Size,
    Words,
)

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
GROUPS = ("Model", "Network", "Keys", "Adapters", "Load", "Memory and threads", "Observing")


def _setting(default: Any, group: str, text: str, **extra: Any) -> Any:
    """A field: its default, the heading in `--help`, its help text; `aliases`, `metavar` and constraints by name."""
    schema = {"group": group, "aliases": extra.pop("aliases", ()), "metavar": extra.pop("metavar", None)}
    return Field(default, description=text, json_schema_extra=schema, **extra)


class Settings(BaseModel):
    """One frozen bundle, passed explicitly and never changed; derived values are properties."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str | None = _setting(
        None, "Model", "Base model: a directory or a Hugging Face id. Without it the small built-in base is served."
    )
    served_model_name: Words = _setting(
        (),
        "Model",
        "Name(s) the base is served under; the first is the one told to clients. Default: MODEL.",
        metavar="NAME",
    )
    revision: str | None = _setting(None, "Model", "Branch, tag or commit of the base model on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "Model", "Type of the base's weights and activations; auto takes the checkpoint's own."
    )
    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "Model", "Where the base runs; auto prefers a GPU.")
    max_model_len: Size | None = _setting(
        None,
        "Model",
        "Longest prompt plus answer, in tokens. Default: what the model was trained for.",
        gt=0,
        metavar="N",
    )

    host: str | None = _setting(
        None,
        "Network",
        "Address to listen on. Default: 0.0.0.0 when an API key or a keys file is set, else 127.0.0.1, so that a "
        "server without a key is never open to the network by accident.",
        metavar="ADDRESS",
    )
    port: int = _setting(8000, "Network", "Port to listen on; 0 takes a free one and prints it.", ge=0, le=65535)
    admin_port: int | None = _setting(
        None, "Network", "Port of the /admin routes, which are then on no other port. Default: --port.", ge=1, le=65535
    )
    root_path: str = _setting("", "Network", "Path prefix that a proxy in front of the server strips.")
    ssl_keyfile: Path | None = _setting(None, "Network", "Private key (PEM) for HTTPS.")
    ssl_certfile: Path | None = _setting(None, "Network", "Certificate chain (PEM) for HTTPS.")
    cors_allow_origin: Words = _setting(
        (),
        "Network",
        "Origin whose web pages may call this server, e.g. https://app.example; repeatable.",
        metavar="ORIGIN",
    )
    keep_alive_s: float = _setting(
        15.0, "Network", "Seconds of silence after which a stream sends a comment, so that no proxy closes it.", gt=0
    )

    api_key: Secrets = _setting(
        (), "Keys", "Key that clients send as `Authorization: Bearer KEY`; repeatable.", metavar="KEY"
    )
    admin_api_key: Secrets = _setting(
        (),
        "Keys",
        "Key for /admin routes; repeatable; it also opens everything else. Without one the API keys open them; "
        "without any key they answer only when the server listens on loopback.",
        metavar="KEY",
    )
    keys_file: Path | None = _setting(
        None,
        "Keys",
        "File of keys that are bound to adapters and to reading, generating or administering; made by `veneer keys`, "
        "read again when it changes. With it, API keys never open the admin routes.",
    )
    share_prefix_cache: bool = _setting(
        False,
        "Keys",
        "Let all keys reuse each other's cached prompts. By default a key (or a tenant of the keys file) reuses its "
        "own, so that nobody can tell by an answer's speed what others asked.",
    )

    adapters_dir: Path | None = _setting(
        None,
        "Adapters",
        "Directory whose subdirectories (adapter_config.json inside) are registered at start by name. "
        "Default: the adapters of the built-in base, when that is served.",
    )
    watch_adapters_dir_s: float = _setting(
        10.0, "Adapters", "Seconds between looks at --adapters-dir for what was dropped into it; 0: none.", ge=0
    )
    keep_versions: int | None = _setting(
        None, "Adapters", "Newest versions to keep of an adapter, besides pinned and aliased ones. Default: all.", gt=0
    )
    store_dir: Path | None = _setting(
        None, "Adapters", "Where uploaded adapters are kept. Default: $XDG_DATA_HOME/veneer/store."
    )
    lora_modules: LoraModules = _setting(
        (),
        "Adapters",
        'Adapters to register at start: NAME=PATH or {"name": ..., "path": ...}, several may follow; a path is a '
        "directory, or a source as org/repo@revision, s3://bucket/folder.",
        metavar="NAME=PATH",
    )
    adapter_roots: Paths = _setting(
        (),
        "Adapters",
        "Directory below which the admin routes may name adapters by path, besides --adapters-dir; repeatable.",
        metavar="DIRECTORY",
    )
    hub_endpoint: Address | None = _setting(
        None, "Adapters", "Address of the Hub that adapters are fetched from. Default: $HF_ENDPOINT.", metavar="URL"
    )
    offline: bool = _setting(
        False,
        "Adapters",
        "Fetch no adapter over the network; of the Hub, take what its local cache holds. $HF_HUB_OFFLINE does it too.",
    )
    https_sources: Words = _setting(
        (),
        "Adapters",
        "Host that adapters may be fetched from by https://, e.g. models.example or *.example; repeatable. "
        "Default: none.",
        metavar="HOST",
    )
    https_source_networks: Networks = _setting(
        (),
        "Adapters",
        "Network (as 10.1.0.0/16) that is not public and may be reached by https:// all the same; repeatable.",
        metavar="CIDR",
    )
    adapter_auto_load: AdapterPatterns = _setting(
        (),
        "Adapters",
        "Fetch an unknown adapter from the Hub when a request names it and it matches, e.g. org/sql-*; repeatable.",
        metavar="ORG/PATTERN",
    )
    enable_lora: bool = _setting(True, "Adapters", "Accepted for vLLM's command lines; adapters are always on.")
    max_loras: int | None = _setting(
        None,
        "Adapters",
        "Number of adapters that routers may assume fit at once (told in /info and vllm:lora_requests_info). "
        "Nothing is limited by it: memory is bounded in bytes.",
        gt=0,
    )
    max_cpu_loras: int | None = _setting(
        None, "Adapters", "As --max-loras for host memory; told in /info. Nothing is limited by it.", gt=0
    )
    max_lora_rank: int | None = _setting(
        None, "Adapters", "Refuse adapters of a higher rank. Default: any rank is served.", gt=0
    )
    max_dense_adapter_bytes: Size = _setting(
        256 * 2**20,
        "Adapters",
        "Refuse adapters whose changes are whole matrices of more bytes together, in float32.",
        ge=0,
        metavar="SIZE",
    )
    probe_adapters: bool = _setting(
        True, "Adapters", "Measure how far a new adapter moves the base, by one short prompt on both."
    )
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto",
        "Adapters",
        "Type adapters are kept in on the device: auto is the base's, float32 is exact at twice the bytes.",
        aliases=("--lora-dtype",),
    )
    allow_runtime_lora_updating: bool = _setting(
        False, "Adapters", "Open vLLM's /v1/load_lora_adapter and its like; so does $VLLM_ALLOW_RUNTIME_LORA_UPDATING."
    )
    image_cache_bytes: Size = _setting(
        64 * 2**30,
        "Adapters",
        "Most that packed images in the store may take on disk; those unused longest go first, and are packed again "
        "when needed.",
        gt=0,
        metavar="SIZE",
    )
    max_upload_bytes: Size = _setting(
        2 * 2**30, "Adapters", "Largest upload of one adapter version, all files together.", gt=0, metavar="SIZE"
    )

    max_num_seqs: int = _setting(256, "Load", "Requests that run at the same time.", gt=0, le=4096)
    max_num_batched_tokens: Size = _setting(2048, "Load", "Tokens computed in one step, prompts included.", ge=512)
    max_queued_requests: int = _setting(
        256, "Load", "Requests that may wait; the next one is told 429 with Retry-After.", ge=0
    )
    max_concurrent_requests: int | None = _setting(
        None, "Load", "Requests in the house at once, running and waiting. Default: no bound but the queue's.", gt=0
    )
    max_best_of: int = _setting(4, "Load", "Largest best_of of one request.", ge=1)
    max_stop_sequences: int = _setting(16, "Load", "Stop strings one request may name.", ge=0)
    max_top_n_tokens: int = _setting(20, "Load", "Alternatives one request may ask for per token.", ge=0)
    request_timeout_s: float | None = _setting(
        600.0, "Load", "Seconds after which an unfinished request is failed.", gt=0
    )
    stalled_client_s: float = _setting(
        60.0, "Load", "Seconds that a client may take nothing of its stream, or send nothing of its upload.", gt=0
    )
    upload_timeout_s: float = _setting(
        3600.0, "Load", "Seconds after which an upload that is still arriving is dropped.", gt=0
    )
    graceful_timeout_s: float = _setting(
        90.0, "Load", "Seconds that running requests get to finish after SIGTERM.", ge=0
    )
    max_body_bytes: Size = _setting(
        4 * 2**20, "Load", "Largest body of a request that is not an upload.", gt=0, metavar="SIZE"
    )

    pool_bytes: Size | None = _setting(
        None,
        "Memory and threads",
        "Memory for K/V blocks and adapters together. Default: sized from the machine's or container's limit.",
        gt=0,
        metavar="SIZE",
        aliases=("--kv-cache-memory-bytes",),
    )
    adapter_memory: Size | None = _setting(
        None,
        "Memory and threads",
        "Most of the pool that adapters may take. Default: whatever K/V blocks leave.",
        gt=0,
        metavar="SIZE",
    )
    host_adapter_memory: Size | None = _setting(
        None,
        "Memory and threads",
        "Memory outside the pool for copies of adapters, from which they come back without the disk. Default: 0 on a "
        "CPU, where the pool is host memory itself and the page cache does the same; beside a GPU up to 8G.",
        ge=0,
        metavar="SIZE",
    )
    adapter_eviction: Literal["weighed", "lru"] = _setting(
        "weighed",
        "Memory and threads",
        "Which idle adapter goes: by age, use, size and cost to reload, or by age alone.",
    )
    enable_prefix_caching: bool = _setting(
        True, "Memory and threads", "Keep K/V of finished prompts and reuse them for equal beginnings."
    )
    num_threads: int | None = _setting(
        None, "Memory and threads", "Threads of the engine. Default: the processors this process may use.", gt=0
    )

    metrics_compat: Literal["vllm", "none"] = _setting(
        "vllm", "Observing", "Names besides veneer_* in /metrics: vllm adds those that its dashboards and routers read."
    )
    metrics_adapter_label: Literal["off", "counters"] = _setting(
        "counters", "Observing", "Whether counters per adapter are kept."
    )
    metrics_max_adapters: int = _setting(
        100, "Observing", 'Adapters with series of their own; the others share adapter="__other__".', ge=0
    )
    usage_ledger: bool = _setting(
        True, "Observing", "Keep in the store how many tokens every key had of every adapter version."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Observing", "What is worth a log line.")
    access_log: bool = _setting(False, "Observing", "One log line per HTTP request.")
    enable_docs: bool = _setting(True, "Observing", "Serve /docs and /openapi.json.")

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

    @model_validator(mode="after")
    def _network_settings_fit(self) -> Settings:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("--ssl-keyfile and --ssl-certfile belong together; give both or neither")
        if self.admin_port is not None and self.admin_port == self.port:
            raise ValueError("--admin-port is --port; leave it out, or choose another port for the /admin routes")
        return self

    @property
    def bind_host(self) -> str:
        if self.host is not None:
            return self.host
        return "0.0.0.0" if self.api_key or self.keys_file else "127.0.0.1"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.bind_host in LOOPBACK_HOSTS or self.bind_host.startswith("127.")

    @property
    def base_name(self) -> str:
        """The base's name as clients see it."""
        if self.served_model_name:
            return self.served_model_name[0]
        if self.model is None:
            return BASE_NAME
        return Path(self.model).name if Path(self.model).is_dir() else self.model

    @property
    def store_path(self) -> Path:
        if self.store_dir is not None:
            return self.store_dir
        data_home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return Path(data_home) / "veneer" / "store"

    @property
    def engine_threads(self) -> int:
        return self.num_threads or cpu_limit()
