"""Starting the engine's loop: in a process of its own, where it belongs, or on a thread of this one.

Both ends speak the same messages over the same kind of channel, so the client does not know which it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Protocol

from server.channel import AsyncChannel, Message, Worker, WorkerChannel, spawn
from server.engine.watchdog import STACKS_SIGNAL
from server.engine.worker import DEFAULT_BUILD, Build, serve

# Threads that wait for each other spin for some microseconds and then sleep. Spinning for ever, the thread that they
# wait for gets no processor as soon as anything else wants one, and a step that takes 4 ms takes 400; sleeping at once
# costs a wake-up at every one of a step's thousand small products. Whoever knows better sets it.
_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000"}

OnMessage = Callable[[Message], None]
OnClose = Callable[[], None]


class Launched(Protocol):
    """A running loop as its client sees it."""

    @property
    def channel(self) -> AsyncChannel: ...

    @property
    def pid(self) -> int | None:
        """None: it is a thread of this process."""

    def ask_for_stacks(self) -> None:
        """Have the stacks of its threads written to stderr."""

    def kill(self) -> None:
        """End it at once; the channel closes."""

    async def close(self, timeout_s: float) -> int:
        """Hang up, wait for its end (not longer than `timeout_s`, then kill it); its exit status."""


Launch = Callable[[OnMessage, OnClose], Awaitable[Launched]]


def in_process(build: str = DEFAULT_BUILD) -> Launch:
    """A process per start. `build` is the MODULE:FUNCTION that builds the engine there."""

    async def launch(on_message: OnMessage, on_close: OnClose) -> Launched:
        worker = await spawn(
            *("server.engine.worker", "--build", build),
            on_message=on_message,
            on_close=on_close,
            environment={name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()},
        )
        return EngineProcess(worker)

    return launch


def in_thread(build: Build) -> Launch:
    """A thread per start, for tests and library use: the model then shares this process's interpreter lock."""

    async def launch(on_message: OnMessage, on_close: OnClose) -> Launched:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        thread = threading.Thread(target=_serve_and_close, args=(theirs, build), name="engine", daemon=True)
        thread.start()
        return EngineThread(await AsyncChannel.connect(ours, on_message, on_close), thread)

    return launch


class EngineProcess:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def channel(self) -> AsyncChannel:
        return self._worker.channel

    @property
    def pid(self) -> int | None:
        return self._worker.process.pid

    def ask_for_stacks(self) -> None:
        self._signal(STACKS_SIGNAL)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def close(self, timeout_s: float) -> int:
        return await self._worker.close(timeout_s)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._worker.process.send_signal(number)


class EngineThread:
    def __init__(self, channel: AsyncChannel, thread: threading.Thread) -> None:
        self._channel = channel
        self._thread = thread

    @property
    def channel(self) -> AsyncChannel:
        return self._channel

    @property
    def pid(self) -> int | None:
        return None

    def ask_for_stacks(self) -> None:
        faulthandler.dump_traceback(all_threads=True)

    def kill(self) -> None:
        self._channel.close()

    async def close(self, timeout_s: float) -> int:
        self._channel.close()
        await asyncio.to_thread(self._thread.join, timeout_s)
        return int(self._thread.is_alive())


def _serve_and_close(sock: socket.socket, build: Build) -> None:
    channel = WorkerChannel(sock)
    try:
        serve(channel, build)
    finally:
        channel.close()
