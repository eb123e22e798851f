"""From the settings to what the front starts: the engine's configuration, the store, the adapters named at start."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from pathlib import Path

from adapters_store.audit_log import AuditEntry, AuditLog
from adapters_store.errors import StoreError
from adapters_store.layout import check_store
from adapters_store.staging import StageLimits
from server.demo import ADAPTERS_DIR, BASE_DIR
from server.engine.client import EngineClient, LoadProgress, OnEvent
from server.engine.config import EngineConfig
from server.front.errors import CannotStart
from server.front.tokenizer import require_tokenizer
from server.front.warm_start import WarmStart
from server.library.directory import AdapterDirectory, find_directories
from server.library.errors import LibraryError, SourceInvalid
from server.library.library import Library
from server.library.probe import Probe
from server.library.sources.policy import SourcePolicy
from server.library.sources.puller import Puller
from server.library.sources.reference import Scheme, parse_source
from server.loader.client import LoaderClient
from server.loader.errors import LoaderError
from server.loader.job import PackingTarget
from server.setting_groups.values import LoraModule
from server.settings import Settings

log = logging.getLogger(__name__)


def model_of(settings: Settings) -> str:
    """The base: a directory or a hub id; the built-in one if the settings name none."""
    return settings.model or str(BASE_DIR)


def engine_config(settings: Settings) -> EngineConfig:
    """The part of the settings that the engine process is told."""
    return EngineConfig(
        model=model_of(settings),
        name=settings.base_name if settings.model is None else None,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        adapter_dtype=settings.adapter_dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        pool_bytes=settings.pool_bytes,
        adapter_bytes=settings.adapter_memory,
        host_adapter_bytes=settings.host_adapter_memory,
        adapter_eviction=settings.adapter_eviction,
        enable_prefix_caching=settings.enable_prefix_caching,
        num_threads=settings.engine_threads,
    )


def source_policy(settings: Settings) -> SourcePolicy:
    """What may be fetched, and from where."""
    roots = (*settings.adapter_roots, *((settings.adapters_dir,) if settings.adapters_dir is not None else ()))
    return SourcePolicy(
        roots=roots,
        hub_endpoint=settings.hub_endpoint,
        is_offline=settings.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        web_hosts=settings.https_sources,
        web_networks=tuple(ipaddress.ip_network(network) for network in settings.https_source_networks),
        auto_load=settings.adapter_auto_load,
    )


async def check_paths(settings: Settings) -> None:
    """Refuse what cannot work before anything that takes seconds is started.

    Raises:
        CannotStart: the model is a path, and no model lies there, or no tokenizer.
        NotADirectory: `adapters_dir` is none.
        StoreUnusable: the store is in use, or is none.
    """
    _check_model(model_of(settings))
    if settings.adapters_dir is not None:
        await asyncio.to_thread(find_directories, settings.adapters_dir)
    await asyncio.to_thread(check_store, settings.store_path)


def _check_model(model: str) -> None:
    """Anything that looks like a path must be a model's directory; the rest may be an id on the Hub."""
    path = Path(model)
    if path.is_dir():
        if (path / "config.json").is_file():
            require_tokenizer(path)
            return
        if (path / "adapter_config.json").is_file():
            raise CannotStart(f"{model} is an adapter. Serve its base model, with --lora-modules NAME={model}.")
        raise CannotStart(f"the directory {model} holds no model: config.json is missing.")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise CannotStart(f"there is no directory {model}. MODEL is a directory, or an id like org/name on the Hub.")


async def open_library(settings: Settings, engine: EngineClient, loader: LoaderClient) -> Library:
    """Aim the loader at this base and open the store. Raises StoreUnusable, LoaderUnavailable."""
    limits = StageLimits(
        max_file_bytes=settings.max_upload_bytes,
        max_total_bytes=settings.max_upload_bytes,
        max_staged_bytes=settings.max_staged_bytes,
    )
    description = engine.description
    target = PackingTarget(
        description.spec,
        description.adapter_dtype,
        description.base_directory,
        description.dtype,
        settings.max_dense_adapter_bytes,
    )
    await loader.aim(target)
    probe = Probe(engine) if settings.probe_adapters else None
    return await Library.open(
        settings.store_path,
        loader,
        limits=limits,
        max_rank=settings.max_lora_rank,
        probe=probe,
        keep_versions=settings.keep_versions,
    )


async def warm_up(engine: EngineClient, library: Library, on_event: OnEvent) -> WarmStart:
    """Bring what was on the device of this host in the last run back to it, and keep the list of it from now on."""
    fingerprint = library.catalog.base_fingerprint.removeprefix("sha256:")[:16]
    warm = WarmStart(engine, library, library.catalog.root / "warm" / f"{socket.gethostname()}-{fingerprint}.json")
    await warm.load(on_event)
    warm.watch()
    return warm


async def register_adapters(library: Library, puller: Puller, settings: Settings, on_event: OnEvent) -> None:
    """Register what `adapters_dir` (by default what came with the built-in base) and `lora_modules` bring.

    An adapter that cannot be registered stops nothing: it is logged, and a request for it is told the reason. One that
    cannot be fetched is as it was in the store.

    Raises:
        NotADirectory: `adapters_dir` is none, or is an adapter itself.
    """

    def tell(num_done: int, num_found: int, name: str) -> None:
        on_event(LoadProgress("adapters", num_done / num_found))

    adapters_dir = settings.adapters_dir
    if adapters_dir is None and settings.model is None and ADAPTERS_DIR.is_dir():
        adapters_dir = ADAPTERS_DIR
    if adapters_dir is not None:
        await library.discover(adapters_dir, tell)
    for module in settings.lora_modules:
        if _is_fetched(module.path):
            await _fetch(library, puller, module)
            continue
        with contextlib.suppress(StoreError, LoaderError, LibraryError, OSError):  # the library logs and remembers it
            await library.register(AdapterDirectory(module.name, Path(module.path)))


def _is_fetched(path: str) -> bool:
    """Whether a module's path is a source elsewhere. A directory of this machine may look like an id of the Hub."""
    if Path(path).is_dir():
        return False
    try:
        return parse_source(path).scheme is not Scheme.LOCAL
    except SourceInvalid:
        return False


async def _fetch(library: Library, puller: Puller, module: LoraModule) -> None:
    try:
        committed = await puller.pull(module.path, module.name)
        if committed.created:
            entry = AuditEntry("start", "adapter.register", str(committed.version), {"source": module.path})
            await asyncio.to_thread(AuditLog(library.catalog.root).note, entry)
    except (LibraryError, StoreError, LoaderError) as error:
        log.warning("adapter %r cannot be fetched from %s: %s", module.name, module.path, error)
