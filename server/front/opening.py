"""From the settings to what the front starts: the engine's configuration, the store, the adapters named at start."""

from __future__ import annotations

import logging
from pathlib import Path

from adapters_store.errors import StoreError
from adapters_store.staging import StageLimits
from server.demo import ADAPTERS_DIR, BASE_DIR
from server.engine.client import LoadProgress, OnEvent
from server.engine.config import EngineConfig
from server.engine.description import EngineDescription
from server.library.directory import AdapterDirectory
from server.library.library import Library
from server.loader.client import LoaderClient
from server.loader.errors import LoaderError
from server.loader.job import PackingTarget
from server.settings import Settings

_log = logging.getLogger(__name__)


def model_of(settings: Settings) -> str:
    """The base: a directory or a hub id; the built-in one if the settings name none."""
    return settings.model or str(BASE_DIR)


def engine_config(settings: Settings) -> EngineConfig:
    """The part of the settings that the engine process is told."""
    return EngineConfig(
        model=model_of(settings),
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        adapter_dtype=settings.adapter_dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        pool_bytes=settings.pool_bytes,
        enable_prefix_caching=settings.enable_prefix_caching,
        num_threads=settings.engine_threads,
    )


async def open_library(settings: Settings, description: EngineDescription) -> Library:
    """Start the loader for this base and open the store. Raises StoreUnusable, LoaderUnavailable."""
    limits = StageLimits(max_file_bytes=settings.max_upload_bytes, max_total_bytes=settings.max_upload_bytes)
    loader = await LoaderClient.start(PackingTarget(description.spec, description.adapter_dtype))
    try:
        return await Library.open(settings.store_path, loader, limits=limits, max_rank=settings.max_lora_rank)
    except BaseException:
        await loader.close()
        raise


async def register_adapters(library: Library, settings: Settings, on_event: OnEvent) -> None:
    """Register what `adapters_dir` (by default what came with the built-in base) and `lora_modules` bring.

    An adapter that cannot be registered stops nothing: it is logged, and a request for it is told the reason.

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
        try:
            await library.register(AdapterDirectory(module.name, Path(module.path)))
        except (StoreError, LoaderError, OSError) as error:
            _log.warning("adapter %r in %s cannot be served: %s", module.name, module.path, error)
