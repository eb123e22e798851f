"""Brings adapter images from disk into the pool while steps go on.

One thread, and in it one `preadv` per image straight into the pool's memory: the interpreter lock
is free for the whole read and for the checksum, so a load costs a running step nothing but memory
bandwidth.
"""

from __future__ import annotations

import os
import queue
import threading
import zlib
from collections import deque
from pathlib import Path

import torch

from peft_core.errors import AdapterError, MalformedAdapter
from peft_core.image import read_header
from server.engine.request import AdapterTicket
from server.engine.step import ImageRead

_Job = tuple[AdapterTicket, int, int]  # ticket, offset in the pool, room in bytes


class PoolReader:
    """The `ImageReader` of an engine whose pool is `pool` [num_bytes] uint8."""

    def __init__(self, pool: torch.Tensor, unit_bytes: int) -> None:
        self._pool, self._unit_bytes = pool, unit_bytes
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._done: deque[ImageRead] = deque()
        threading.Thread(target=self._run, name="image-reader", daemon=True).start()

    def start(self, ticket: AdapterTicket, first_unit: int, num_units: int) -> None:
        self._jobs.put((ticket, first_unit * self._unit_bytes, num_units * self._unit_bytes))

    def poll(self) -> list[ImageRead]:
        reads = []
        while self._done:
            reads.append(self._done.popleft())
        return reads

    def _run(self) -> None:
        while True:
            ticket, offset, room_bytes = self._jobs.get()
            try:
                header = self._read(Path(ticket.image_path), offset, room_bytes)
                self._done.append(ImageRead(ticket.key, header, None))
            except Exception as error:  # whatever it is that breaks: others wait for this thread
                is_told = isinstance(error, AdapterError | OSError)
                reason = str(error) if is_told else f"{type(error).__name__}: {error}"
                self._done.append(ImageRead(ticket.key, None, f'adapter "{ticket.name}" could not be loaded: {reason}'))

    def _read(self, path: Path, offset: int, room_bytes: int) -> dict[str, object]:
        header, start = read_header(path)
        num_bytes: int = header["num_bytes"]
        if num_bytes > room_bytes:
            raise MalformedAdapter(f"{path.name} holds {num_bytes} bytes, the version says at most {room_bytes}.")
        target = self._pool[offset : offset + num_bytes]
        host = target if target.device.type == "cpu" else torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        view = host.numpy().data
        _read_exactly(path, view, start)
        if zlib.crc32(view) != header["crc32"]:
            raise MalformedAdapter(f"{path.name} does not have the checksum that it was written with.")
        if host is not target:
            target.copy_(host)
        return header


def _read_exactly(path: Path, view: memoryview, offset: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while view:
            num_read = os.preadv(descriptor, [view], offset)
            if not num_read:
                raise MalformedAdapter(f"{path.name} ends {len(view)} bytes too early.")
            view, offset = view[num_read:], offset + num_read
    finally:
        os.close(descriptor)
