"""The engine on a thread of this process, behind the same door as the one in its own process.

For tests and for programs that want no second process:

    client = await start_local(config, build_engine)
    async for delta in client.submit(request): ...
"""

from __future__ import annotations

from server.engine.client import EngineClient, OnEvent
from server.engine.config import EngineConfig
from server.engine.launch import in_thread
from server.engine.worker import Build


async def start_local(config: EngineConfig, build: Build, *, on_event: OnEvent | None = None) -> EngineClient:
    """As `EngineClient.start`, with `build` called on the engine's thread."""
    return await EngineClient.start(config, on_event=on_event, launch=in_thread(build))
