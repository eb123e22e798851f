"""Work that several callers may want at once, and that does not stop when one of them goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


class SharedWork:
    """Tasks of one owner, by key. A cancelled caller leaves; the task goes on until it is done or `close` comes."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shared: dict[str, asyncio.Task[Any]] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._num_in_line: dict[str, int] = {}

    async def finish(self, job: Coroutine[Any, Any, Result]) -> Result:
        """Runs a job to its end and returns or raises what it does."""
        return await asyncio.shield(self.start(job))

    async def share(self, key: str, make_job: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """As `finish`, but joins the job of this key that is going on already, if there is one."""
        if key not in self._shared:
            task = self._shared[key] = self.start(make_job())
            task.add_done_callback(lambda _: self._shared.pop(key))
        result: Result = await asyncio.shield(self._shared[key])
        return result

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[None]:
        """Only one holder per key; the others wait in line."""
        lock = self._turns.setdefault(key, asyncio.Lock())
        self._num_in_line[key] = self._num_in_line.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._num_in_line[key] -= 1
            if not self._num_in_line[key]:
                del self._num_in_line[key], self._turns[key]

    async def close(self) -> None:
        """Cancels what is going on and waits for it to end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(self, job: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Runs a job that nobody waits for, or somebody else does."""
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: with every caller gone nobody else looks at it
