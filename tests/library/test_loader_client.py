from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from server.loader.client import LoaderClient
from server.loader.errors import AdapterRefused, LoaderUnavailable
from server.loader.job import PrepareJob
from tests.library.library_samples import make_files, make_target, write_files
from tests.library.local_loader import LocalLoader

Scenario = Callable[[LoaderClient], Awaitable[None]]


def with_loader(scenario: Scenario, job_timeout_s: float = 60.0) -> None:
    async def run() -> None:
        loader = await LoaderClient.launch(job_timeout_s)
        try:
            await loader.aim(make_target())
            await scenario(loader)
        finally:
            await loader.close()

    asyncio.run(asyncio.wait_for(run(), 120))


def make_job(directory: Path, seed: int = 0, **fields: Any) -> PrepareJob:
    return PrepareJob(write_files(directory, make_files(seed, **fields)), str(directory / "image"))


# One field of the config takes for ever to match, as a hostile or careless pattern does.
ENDLESS: dict[str, Any] = {"target_modules": r"(.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*)*!"}


def test_the_process_prepares_as_the_same_code_does_here(tmp_path: Path) -> None:
    async def scenario(loader: LoaderClient) -> None:
        local = LocalLoader(make_target())
        assert loader.variant == local.variant
        there = await loader.prepare(make_job(tmp_path / "there"))
        here = await local.prepare(make_job(tmp_path / "here"))
        assert there == here
        assert (tmp_path / "there" / "image").read_bytes() == (tmp_path / "here" / "image").read_bytes()

    with_loader(scenario)


def test_a_refusal_crosses_the_border_whole_and_the_loader_goes_on(tmp_path: Path) -> None:
    async def scenario(loader: LoaderClient) -> None:
        with pytest.raises(AdapterRefused) as caught:
            await loader.prepare(make_job(tmp_path / "bad", init_lora_weights="lora_ga"))
        assert (caught.value.field, caught.value.value) == ("init_lora_weights", '"lora_ga"')
        jobs = [make_job(tmp_path / str(seed), seed) for seed in range(5)]
        prepared = await asyncio.gather(*(loader.prepare(job) for job in jobs))
        assert len({item.effect_digest for item in prepared}) == 5
        assert loader.num_starts == 1

    with_loader(scenario)


def test_a_loader_that_is_killed_fails_its_job_only_and_is_started_again(tmp_path: Path) -> None:
    async def scenario(loader: LoaderClient) -> None:
        stuck = asyncio.create_task(loader.prepare(make_job(tmp_path / "stuck", **ENDLESS)))
        await asyncio.sleep(0.3)
        waiting = asyncio.create_task(loader.prepare(make_job(tmp_path / "next")))
        assert loader.process_id is not None
        os.kill(loader.process_id, signal.SIGKILL)
        with pytest.raises(LoaderUnavailable) as caught:
            await stuck
        assert caught.value.retryable
        assert (await waiting).num_bytes > 0
        assert loader.num_starts == 2
        assert loader.process_id is not None
        os.kill(loader.process_id, signal.SIGKILL)  # idle this time: nobody notices
        await asyncio.sleep(0.3)
        assert (await loader.prepare(make_job(tmp_path / "third"))).num_bytes > 0

    with_loader(scenario)


def test_a_check_that_never_ends_is_given_up(tmp_path: Path) -> None:
    async def scenario(loader: LoaderClient) -> None:
        with pytest.raises(AdapterRefused) as caught:
            await loader.prepare(make_job(tmp_path / "stuck", **ENDLESS))
        assert caught.value.code == "check_timed_out"
        assert loader.process_id is None

    with_loader(scenario, job_timeout_s=1.0)


def test_a_closed_loader_says_so(tmp_path: Path) -> None:
    async def run() -> None:
        loader = LoaderClient()
        await loader.close()
        await loader.close()
        with pytest.raises(LoaderUnavailable, match="shutting down"):
            await loader.prepare(make_job(tmp_path / "late"))

    asyncio.run(run())


def test_a_loader_that_dies_while_it_comes_up_is_told_when_it_is_aimed() -> None:
    async def run() -> None:
        loader = await LoaderClient.launch()
        try:
            assert loader.process_id is not None, "it comes up while the base is still loading"
            os.kill(loader.process_id, signal.SIGKILL)
            with pytest.raises(LoaderUnavailable):
                await loader.aim(make_target())
        finally:
            await loader.close()

    asyncio.run(asyncio.wait_for(run(), 60))
