"""The engine's life as the front leads it: started, watched, killed when it hangs, started again when it dies.

    STARTING --ready--> READY --its end--> RESTARTING --ready--> READY
                          \\--close--> STOPPED <--close--/

It knows when the engine last spoke, not what about; requests are the client's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from enum import StrEnum
from typing import Any, Protocol

from server.channel import ChannelClosed, Message
from server.engine import wire
from server.engine.config import EngineConfig
from server.engine.description import EngineDescription
from server.engine.errors import EngineStartError, EngineUnavailable
from server.engine.launch import Launch, Launched

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_STEADY_AFTER_S = 60.0  # an engine that lived so long restarts after the first pause again
_CLOSE_S = 5.0

_log = logging.getLogger(__name__)


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


class Client(Protocol):
    """Whom the supervisor tells."""

    def on_message(self, message: Message) -> None:
        """Any message but those of the start."""

    def on_progress(self, stage: str, fraction: float) -> None: ...

    def on_state(self, state: EngineState, message: str) -> None: ...

    def on_lost(self, reason: str) -> None:
        """Whatever the engine was working on is lost."""


class Supervisor:
    """One engine at a time. `live` is False from the moment it is found hanging until a new one is ready."""

    description: EngineDescription

    def __init__(self, config: EngineConfig, launch: Launch, client: Client) -> None:
        self.state = EngineState.STARTING
        self.live = True
        self.heard_s = 0.0  # time.monotonic of its last message, or of `expect_answer`
        self.num_restarts = 0
        self._config = config
        self._launch = launch
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._engine: Launched | None = None
        self._ready: asyncio.Future[EngineDescription] = self._loop.create_future()
        self._ready_s = 0.0
        self._expects_answer = False
        self._pause_s = _FIRST_PAUSE_S
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        return None if self._engine is None else self._engine.pid

    async def start(self) -> None:
        """The first start. Raises EngineStartError with the engine's own words."""
        await self._start_engine()
        self._keep(self._watch())

    def send(self, message: Message) -> None:
        """Raises EngineUnavailable."""
        if self.state is not EngineState.READY:
            raise EngineUnavailable(f"the engine is {self.state.value}; try again shortly.")
        assert self._engine is not None
        try:
            self._engine.channel.send(message)
        except ChannelClosed as error:
            raise EngineUnavailable("the engine's process has just ended; try again shortly.") from error

    def expect_answer(self, expected: bool) -> None:
        """Whether silence is suspicious from now on."""
        if expected and not self._expects_answer:
            self.heard_s = time.monotonic()
        self._expects_answer = expected

    async def close(self) -> None:
        """End the engine for good. May be called twice."""
        if self.state is EngineState.STOPPED:
            return
        self._change(EngineState.STOPPED, "closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._client.on_lost("the engine is stopping")
        if self._engine is not None:
            with contextlib.suppress(ChannelClosed):
                self._engine.channel.send({"kind": wire.STOP})
            await self._end_engine()

    async def _start_engine(self) -> None:
        self._ready = ready = self._loop.create_future()
        try:
            engine = self._engine = await self._launch(
                lambda message: self._on_message(ready, message), lambda: self._on_close(ready)
            )
            with contextlib.suppress(ChannelClosed):  # it is gone already; _on_close tells
                engine.channel.send({"kind": "start", "config": self._config.to_json()})
            self.description = await ready
        except BaseException:
            ready.cancel()
            await self._end_engine()
            raise
        self._ready_s = time.monotonic()
        self.live = True
        self._change(EngineState.READY, "ready")

    async def _end_engine(self) -> int:
        engine, self._engine = self._engine, None
        return 0 if engine is None else await engine.close(_CLOSE_S)

    def _on_message(self, ready: asyncio.Future[EngineDescription], message: Message) -> None:
        if ready is not self._ready:
            return
        self.heard_s = time.monotonic()
        kind = message["kind"]
        if kind == wire.PROGRESS:
            self._client.on_progress(message["stage"], message["fraction"])
        elif kind == wire.READY and not ready.done():
            ready.set_result(wire.description_from_json(message["description"]))
        elif kind == wire.FAILED and not ready.done():
            ready.set_exception(EngineStartError(message["message"]))
        else:
            self._client.on_message(message)

    def _on_close(self, ready: asyncio.Future[EngineDescription]) -> None:
        if not ready.done():
            ready.set_exception(
                EngineStartError("the engine's process ended before it was ready; its own messages say why.")
            )
        elif ready is self._ready and self.state is EngineState.READY:
            self._change(EngineState.RESTARTING, "the engine's process ended")
            self._client.on_lost("the engine died while it worked on this; it is being started again")
            self._keep(self._restart())

    async def _restart(self) -> None:
        if time.monotonic() - self._ready_s > _STEADY_AFTER_S:
            self._pause_s = _FIRST_PAUSE_S
        status = await self._end_engine()
        _log.error("the engine ended with status %d; starting it again in %.1f s", status, self._pause_s)
        while self.state is EngineState.RESTARTING:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s)
            self.num_restarts += 1
            try:
                await self._start_engine()
            except (EngineStartError, OSError) as error:
                _log.error("the engine could not be restarted (%s); trying again in %.1f s", error, self._pause_s)

    async def _watch(self) -> None:
        """Ends an engine that has been silent for too long although an answer is expected."""
        limit_s = self._config.watchdog_s
        while True:
            await asyncio.sleep(limit_s / 4)
            silent_s = time.monotonic() - self.heard_s
            if self.state is not EngineState.READY or not self._expects_answer or silent_s < limit_s:
                continue
            assert self._engine is not None
            self.live = False
            _log.error("the engine said nothing for %.1f s while requests wait; killing it", silent_s)
            self._engine.ask_for_stacks()
            await asyncio.sleep(min(1.0, limit_s / 4))
            if self._engine is not None:
                self._engine.kill()

    def _change(self, state: EngineState, message: str) -> None:
        self.state = state
        self._client.on_state(state, message)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
