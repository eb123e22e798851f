"""Brings adapter images from disk into the pool while steps go on.

    DISK --one read--> HOST --one copy--> DEVICE        with a host tier
    DISK ----------one read-------------> DEVICE        without one, on a CPU

One thread, and in it one `preadv` per image: the interpreter lock is free for the whole read, for the checksum and for
the copy, so a load costs a running step nothing but memory bandwidth, and the thread gives way to the step's own where
they share processors. An image that is in the host tier was checked when it came there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
import zlib
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peft_core.errors import AdapterError, MalformedAdapter
from peft_core.image import read_header
from server.engine.host_images import HostImages
from server.engine.request import AdapterTicket
from server.engine.step import HostImage, ImageRead

_NICENESS = 5  # of the reader's thread: a third of a step thread's share where both want one processor
_TO_DEVICE, _TO_HOST, _TO_CACHE, _TIDY = range(4)  # what a job is, most urgent first


class _Job(NamedTuple):
    urgency: int
    number: int
    ticket: AdapterTicket | None = None
    offset: int = 0  # in the pool
    room_bytes: int = 0
    asked_s: float = 0.0


class PoolReader:
    """The `ImageReader` of an engine whose pool is `pool` [num_bytes] uint8."""

    def __init__(self, pool: torch.Tensor, unit_bytes: int, host: HostImages | None = None) -> None:
        self.host = host or HostImages(0)
        self._pool, self._unit_bytes = pool, unit_bytes
        self._is_cpu = pool.device.type == "cpu"
        self._stream = None if self._is_cpu else torch.cuda.Stream(pool.device)
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._done: deque[ImageRead] = deque()
        threading.Thread(target=self._run, name="image-reader", daemon=True).start()

    @property
    def num_host_hits(self) -> int:
        return self.host.num_hits

    @property
    def host_bytes(self) -> int:
        return self.host.num_bytes

    def start(self, ticket: AdapterTicket, first_unit: int, num_units: int) -> None:
        self._put(_TO_DEVICE, ticket, first_unit * self._unit_bytes, num_units * self._unit_bytes)

    def warm(self, ticket: AdapterTicket) -> bool:
        if not self.host.has_room(ticket.num_bytes):
            self._put(_TO_CACHE, ticket)
            return False
        self._put(_TO_HOST, ticket)
        return True

    def has_host_room(self, num_bytes: int) -> bool:
        return self.host.has_room(num_bytes)

    def is_in_host(self, key: str) -> bool:
        return self.host.holds(key)

    def drop(self, key: str) -> bool:
        was_there = self.host.drop(key)
        self._put(_TIDY)
        return was_there

    def host_images(self) -> list[HostImage]:
        return self.host.images()

    def poll(self) -> list[ImageRead]:
        reads = []
        while self._done:
            reads.append(self._done.popleft())
        return reads

    def _put(self, urgency: int, ticket: AdapterTicket | None = None, offset: int = 0, room_bytes: int = 0) -> None:
        self._jobs.put(_Job(urgency, next(self._numbers), ticket, offset, room_bytes, time.monotonic()))

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a courtesy, not a need
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            job = self._jobs.get()
            if job.ticket is not None:
                self._do(job, job.ticket)
            self.host.unlock()

    def _do(self, job: _Job, ticket: AdapterTicket) -> None:
        if job.urgency == _TO_CACHE:
            _read_ahead(Path(ticket.image_path))
            return
        phases_s = {"queue": time.monotonic() - job.asked_s}
        is_for_host = job.urgency == _TO_HOST
        try:
            if is_for_host:
                self._to_host(ticket, phases_s)
                header = None
            else:
                header = self._read(ticket, job.offset, job.room_bytes, phases_s)
            self._done.append(ImageRead(ticket.key, header, None, phases_s, is_for_host))
        except Exception as error:  # whatever it is that breaks: others wait for this thread
            is_told = isinstance(error, AdapterError | OSError)
            reason = str(error) if is_told else f"{type(error).__name__}: {error}"
            self._done.append(ImageRead(ticket.key, None, reason, phases_s, is_for_host))

    def _read(
        self, ticket: AdapterTicket, offset: int, room_bytes: int, phases_s: dict[str, float]
    ) -> dict[str, object]:
        """Bring the image into the pool; its header."""
        if self._is_cpu and not self.host.has_room(ticket.num_bytes):
            header, start = _header_of(ticket, room_bytes)
            target = self._pool[offset : offset + header["num_bytes"]]
            _fill(target, Path(ticket.image_path), start, header, phases_s)
            return header
        header, payload = self._to_host(ticket, phases_s)
        if payload.numel() > room_bytes:
            raise MalformedAdapter(_too_large(ticket, payload.numel(), room_bytes))
        started_s = time.monotonic()
        self._copy(payload, self._pool[offset : offset + payload.numel()])
        phases_s["copy"] = time.monotonic() - started_s
        return header

    def _to_host(self, ticket: AdapterTicket, phases_s: dict[str, float]) -> tuple[dict[str, Any], torch.Tensor]:
        """The image in host memory, read and checked unless it is there; kept there if the tier has room at all."""
        found = self.host.find(ticket.key)
        if found is not None:
            return found
        header, start = _header_of(ticket, None)
        if not self.host.has_room(header["num_bytes"]):
            payload = torch.empty(header["num_bytes"], dtype=torch.uint8, pin_memory=not self._is_cpu)
            _fill(payload, Path(ticket.image_path), start, header, phases_s)
            return header, payload
        payload = self.host.make_room(header["num_bytes"])
        try:
            _fill(payload, Path(ticket.image_path), start, header, phases_s)
        except BaseException:
            self.host.let_go(payload)
            raise
        self.host.add(ticket, header, payload)
        return header, payload

    def _copy(self, payload: torch.Tensor, target: torch.Tensor) -> None:
        if self._stream is None:
            target.copy_(payload)
            return
        with torch.cuda.stream(self._stream):  # beside the steps, which wait for nothing of it
            target.copy_(payload, non_blocking=True)
        self._stream.synchronize()


def _header_of(ticket: AdapterTicket, room_bytes: int | None) -> tuple[dict[str, Any], int]:
    """The header and where the payload begins. Raises MalformedAdapter if it holds more than there is room for."""
    header, start = read_header(Path(ticket.image_path))
    if room_bytes is not None and header["num_bytes"] > room_bytes:
        raise MalformedAdapter(_too_large(ticket, header["num_bytes"], room_bytes))
    return header, start


def _too_large(ticket: AdapterTicket, num_bytes: int, room_bytes: int) -> str:
    return f"{Path(ticket.image_path).name} holds {num_bytes} bytes, the version says at most {room_bytes}."


def _fill(payload: torch.Tensor, path: Path, start: int, header: dict[str, Any], phases_s: dict[str, float]) -> None:
    """Read the payload and compare its checksum. Raises OSError, MalformedAdapter."""
    view = payload.numpy().data
    started_s = time.monotonic()
    _read_exactly(path, view, start)
    read_s = time.monotonic()
    if zlib.crc32(view) != header["crc32"]:
        raise MalformedAdapter(f"{path.name} does not have the checksum that it was written with.")
    phases_s["read"], phases_s["check"] = read_s - started_s, time.monotonic() - read_s


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


def _read_ahead(path: Path) -> None:
    """Have the kernel bring the file into its page cache; what is wrong with it is told by the read that follows."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
