"""A base of two layers described by hand, and adapters for it written byte by byte."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from adapters_store.catalog import Committed
from peft_core.spec import BaseModelSpec, Site
from server.library.lease import AdapterLease
from server.library.library import Library
from server.loader.job import PackingTarget, Prepared, PrepareJob
from tests.library.local_loader import LocalLoader

HIDDEN = 16
PREFIX = "base_model.model."
MODULES = ("q_proj", "v_proj")


def make_spec(fingerprint: str = "sha256:base-one") -> BaseModelSpec:
    paths = [f"model.layers.{layer}.self_attn.{module}" for layer in range(2) for module in MODULES]
    sites = [Site(path, "linear", HIDDEN, HIDDEN, has_bias=False, transposed=False) for path in paths]
    return BaseModelSpec("llama", HIDDEN, 2, 100, 512, False, fingerprint, {site.path: site for site in sites}, ())


def make_target(fingerprint: str = "sha256:base-one", dtype: str = "float32") -> PackingTarget:
    return PackingTarget(make_spec(fingerprint).to_json(), dtype)


def make_config(rank: int = 4, **fields: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": list(MODULES),
        **fields,
    }


def make_tensors(seed: int = 0, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in make_spec().sites:
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=generator)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(HIDDEN, rank, generator=generator)
    return tensors


def make_files(seed: int = 0, rank: int = 4, **fields: Any) -> dict[str, bytes]:
    """A sound adapter; its weights depend on `seed`, its config on the fields."""
    return {
        "adapter_config.json": json.dumps(make_config(rank, **fields)).encode(),
        "adapter_model.safetensors": save(make_tensors(seed, rank)),
    }


def write_files(directory: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Writes files and returns them as a `PrepareJob` wants them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return {name: str(directory / name) for name in files}


async def upload(library: Library, name: str, files: Mapping[str, bytes], **options: Any) -> Committed:
    stage = library.stage()
    for path, data in files.items():
        stage.add_file(path, [data])
    return await library.add(stage, name, **options)


class CountingLoader:
    """A loader in this process that counts its jobs, can be held up, and can be told to fail."""

    def __init__(self, target: PackingTarget | None = None) -> None:
        self._inner = LocalLoader(target or make_target())
        self.num_jobs = 0
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def target(self) -> PackingTarget:
        return self._inner.target

    @property
    def variant(self) -> str:
        return self._inner.variant

    async def prepare(self, job: PrepareJob) -> Prepared:
        self.num_jobs += 1
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return await self._inner.prepare(job)

    async def close(self) -> None:
        await self._inner.close()


@asynccontextmanager
async def open_library(
    store: Path, target: PackingTarget | None = None, **options: Any
) -> AsyncIterator[tuple[Library, CountingLoader]]:
    loader = CountingLoader(target)
    library = await Library.open(store, loader, **options)
    try:
        yield library, loader
    finally:
        await library.close()


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Makes an async test an ordinary one, with a bound on its time."""

    @functools.wraps(test)
    def run(*arguments: Any, **options: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **options), 60))

    return run


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits until something that happens in the background has happened."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it has not happened within 10 s")


def image_bytes(lease: AdapterLease) -> bytes:
    return Path(lease.ticket.image_path).read_bytes()


def drop_image(lease: AdapterLease) -> None:
    Path(lease.ticket.image_path).unlink()
