"""Framed JSON between the front process and its workers, over one Unix socket pair.

    frame = length (4 bytes, big endian) + one JSON object (UTF-8)

The front holds an `AsyncChannel`: each complete frame calls `on_message` once, the end of the
stream calls `on_close` once. A worker holds a `WorkerChannel`: it reads without blocking between
pieces of work, and sleeps in `wait` when it has none. Messages are plain data, never pickled
objects. This file knows no message's meaning.

A worker is started by `spawn("server.engine.worker", ...)` as `python -m server.engine.worker --fd 5`
and opens its end with `WorkerChannel.open(5)`. It dies with its parent: a thread that sleeps in the
kernel until the other end closes ends the process, even in the middle of a long load.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

Message = dict[str, Any]

MAX_FRAME_BYTES = 64 * 1024 * 1024
EXIT_PARENT_GONE = 75  # EX_TEMPFAIL: nobody is left to work for

_LENGTH = struct.Struct(">I")
_READ_BYTES = 1 << 18
_HANG_UP = select.POLLHUP | getattr(select, "POLLRDHUP", select.POLLHUP)


class ChannelClosed(ConnectionError):
    """The other end of the channel is gone, so nothing more can be sent or received."""


class BadFrame(ValueError):
    """What arrived, or was about to be sent, is no frame: too large, or not a JSON object."""


def encode(message: Mapping[str, Any]) -> bytes:
    """One frame. Raises BadFrame if it is over MAX_FRAME_BYTES or holds what JSON cannot say (NaN too)."""
    try:
        body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise BadFrame(f"a message must be plain finite JSON data: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise BadFrame(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES} bytes for one frame.")
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Turns bytes as they arrive, cut anywhere, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """All messages that `data` completes, in order. Raises BadFrame; the stream is useless after that."""
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (num_bytes,) = _LENGTH.unpack_from(buffer, start)
            if num_bytes > MAX_FRAME_BYTES:
                raise BadFrame(f"a frame announces {num_bytes} bytes; the limit is {MAX_FRAME_BYTES} bytes.")
            end = start + _LENGTH.size + num_bytes
            if len(buffer) < end:
                break
            messages.append(_parse(buffer[start + _LENGTH.size : end]))
            start = end
        if start:
            del buffer[:start]
        return messages


def _parse(body: bytearray) -> Message:
    try:
        message = json.loads(body)
    except ValueError as error:
        raise BadFrame(f"a frame's body is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise BadFrame(f"a frame must hold a JSON object, not {type(message).__name__}.")
    return message


class WorkerChannel:
    """A worker's end: one thread sends and receives; `wake` alone may be called from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._decoder = FrameDecoder()
        self._inbox: deque[Message] = deque()
        self._closed = False
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)

    @classmethod
    def open(cls, fd: int) -> WorkerChannel:
        """The channel whose descriptor `spawn` passed; binds the life of this process to the parent's.

        SIGINT and SIGTERM are ignored from here on: when a worker stops is the front's decision.
        """
        sock = socket.socket(fileno=fd)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=_exit_on_hang_up, args=(fd,), name="parent-watch", daemon=True).start()
        return cls(sock)

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends one message whole. Waits while the other end is slow, and reads meanwhile, so two
        senders never wait for each other. Raises ChannelClosed, BadFrame."""
        remaining = memoryview(encode(message))
        while remaining:
            try:
                remaining = remaining[self._socket.send(remaining) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._socket, select.POLLIN | select.POLLOUT)
                poll.poll()
                self._read()
            except OSError as error:
                raise ChannelClosed(f"the other end of the channel is gone: {error}") from error

    def receive(self) -> list[Message]:
        """Every message that has arrived, in order; empty if none. Never blocks.

        Raises:
            ChannelClosed: the other end is gone and everything it sent has been handed out.
        """
        self._read()
        messages = list(self._inbox)
        self._inbox.clear()
        if not messages and self._closed:
            raise ChannelClosed("the other end of the channel is gone.")
        return messages

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleeps until there is something to receive or someone calls `wake`. False: the time ran out."""
        if self._inbox or self._closed:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        ready = poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)
        return bool(ready)

    def wake(self) -> None:
        """Ends the present or next `wait`. Safe from any thread; changes nothing else."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._waker, b"\0")

    def close(self) -> None:
        self._closed = True
        self._socket.close()
        os.close(self._woken)
        os.close(self._waker)

    def _read(self) -> None:
        while not self._closed:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._closed = True
                return
            self._inbox.extend(self._decoder.feed(data))


def _exit_on_hang_up(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, _HANG_UP)
    poll.poll()
    os._exit(EXIT_PARENT_GONE)


class AsyncChannel(asyncio.Protocol):
    """The front's end: calls back once per message, in the event loop's thread."""

    def __init__(self, on_message: Callable[[Message], None], on_close: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_close = on_close
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(
        cls, sock: socket.socket, on_message: Callable[[Message], None], on_close: Callable[[], None]
    ) -> AsyncChannel:
        """`on_message` must not raise; `on_close` is called once, after the last message."""
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(on_message, on_close), sock=sock)
        return channel

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Mapping[str, Any]) -> None:
        """Queues one message for sending. Raises ChannelClosed, BadFrame."""
        frame = encode(message)
        if self._transport is None or self._transport.is_closing():
            raise ChannelClosed("the worker at the other end of the channel is gone.")
        self._transport.write(frame)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._decoder.feed(data)
        except BadFrame:
            assert self._transport is not None
            self._transport.abort()
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_close()


@dataclass(frozen=True, slots=True)
class Worker:
    """A started worker process and the front's end of its channel."""

    process: asyncio.subprocess.Process
    channel: AsyncChannel

    async def close(self, timeout_s: float = 5.0) -> int:
        """Hangs up, which ends the worker, and reaps it; kills it if it is still there after `timeout_s`."""
        self.channel.close()
        try:
            return await asyncio.wait_for(self.process.wait(), timeout_s)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                self.process.kill()
            return await self.process.wait()


async def spawn(
    module: str,
    *arguments: str,
    on_message: Callable[[Message], None],
    on_close: Callable[[], None],
    environment: Mapping[str, str] | None = None,
) -> Worker:
    """Starts `python -m module --fd N arguments...` with the other end of a new channel as descriptor N.

    The worker gets its own session, so that Ctrl-C in a terminal reaches only the front. `environment`
    is added to this process's own.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, "--fd", str(theirs.fileno()), *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Worker(process, await AsyncChannel.connect(ours, on_message, on_close))
