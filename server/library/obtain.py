"""What has to be given back, made in a thread for an event loop: a caller who is cancelled does not leave it behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from adapters_store.staging import Stage

Thing = TypeVar("Thing")


async def obtain(make: Callable[[], Thing], give_back: Callable[[Thing], object]) -> Thing:
    """What `make` returns or raises; where the caller is cancelled, `give_back` gets it once it is made."""
    loop = asyncio.get_running_loop()
    making = loop.run_in_executor(None, make)

    def undo(done: asyncio.Future[Thing]) -> None:
        if not done.cancelled() and done.exception() is None:
            loop.run_in_executor(None, give_back, done.result())

    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(undo)
        raise


@asynccontextmanager
async def open_stage(make: Callable[[], Stage]) -> AsyncIterator[Stage]:
    """A stage that `make` opens, gone when the block ends: to remove gigabytes takes a while. Raises DiskFull."""
    stage = await obtain(make, Stage.close)
    try:
        yield stage
    finally:
        await asyncio.shield(asyncio.to_thread(stage.close))
