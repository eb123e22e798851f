"""The loader in this process, for tests: no process to start, the same code."""

from __future__ import annotations

import asyncio

from server.loader.job import PackingTarget, Prepared, PrepareJob
from server.loader.prepare import Packer


class LocalLoader:
    """A `Loader` that works in a thread of the caller's process."""

    def __init__(self, target: PackingTarget) -> None:
        self.target = target
        self._packer = Packer(target)
        self._turn = asyncio.Lock()

    @property
    def variant(self) -> str:
        return self._packer.variant

    async def prepare(self, job: PrepareJob) -> Prepared:
        """Raises AdapterRefused."""
        async with self._turn:
            return await asyncio.to_thread(self._packer.prepare, job)

    async def close(self) -> None:
        """Nothing to end."""
