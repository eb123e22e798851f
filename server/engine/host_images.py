"""The host tier: checked images in memory outside the pool, within a budget of bytes.

Each image has an anonymous mapping of its own, so that what is given up goes back to the system at once and no
allocator keeps it. For a CUDA device the mappings are page-locked, so that copies run at the bus's speed beside the
steps. Who goes when there is no room is the eviction policy's choice, as on the device.

On a CPU the pool is host memory, too, and this tier is a second copy of it: it is worth its bytes only where the
page cache cannot be relied on (other programs on the machine, container limits). Its budget is therefore zero there
unless the operator asks; the kernel's page cache does the same work without one.
"""

from __future__ import annotations

import itertools
import mmap
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from server.engine.policy import WorthOf, worth_by_use
from server.engine.request import AdapterTicket
from server.engine.step import HostImage

_NUM_COMPARED = 16
_PAGE = mmap.PAGESIZE
_UNIT_BYTES = 1 << 18  # sizes in which the policy is asked; any number does, since only ratios count


@dataclass(slots=True)
class _Image:
    ticket: AdapterTicket
    header: dict[str, Any]
    payload: torch.Tensor  # [num_bytes] uint8 over an anonymous mapping
    room_bytes: int
    last_used_s: float
    num_uses: float = 1.0


class HostImages:
    """Read and written by the reader's thread; counted and listed by the engine's."""

    def __init__(self, max_bytes: int, *, lock_pages: bool = False, worth_of: WorthOf = worth_by_use) -> None:
        """`lock_pages`: register every image with CUDA."""
        self.max_bytes = max_bytes
        self.num_bytes = 0  # held now, in whole pages
        self.num_hits = 0
        self.num_evictions = 0
        self._lock_pages = lock_pages
        self._worth_of = worth_of
        self._images: OrderedDict[str, _Image] = OrderedDict()  # least recently used first
        self._to_unlock: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def has_room(self, num_bytes: int) -> bool:
        return _mapped_bytes(num_bytes) <= self.max_bytes

    def holds(self, key: str) -> bool:
        return key in self._images

    def find(self, key: str) -> tuple[dict[str, Any], torch.Tensor] | None:
        """Header and payload, counted as used."""
        with self._lock:
            image = self._images.get(key)
            if image is None:
                return None
            image.last_used_s = time.monotonic()
            image.num_uses += 1
            self.num_hits += 1
            self._images.move_to_end(key)
            return image.header, image.payload

    def make_room(self, num_bytes: int) -> torch.Tensor:
        """An empty payload [num_bytes], others evicted for it as needed; `add` it, or let it go.

        The caller has asked `has_room`.
        """
        room_bytes = _mapped_bytes(num_bytes)
        with self._lock:
            while self.num_bytes + room_bytes > self.max_bytes:
                self._drop(self._cheapest())
                self.num_evictions += 1
        payload = torch.frombuffer(mmap.mmap(-1, room_bytes), dtype=torch.uint8)[:num_bytes]
        if self._lock_pages:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(payload.data_ptr(), room_bytes, 0))
        return payload

    def add(self, ticket: AdapterTicket, header: dict[str, Any], payload: torch.Tensor) -> None:
        """Keep a checked image whose payload came from `make_room`."""
        with self._lock:
            room_bytes = _mapped_bytes(payload.numel())
            self._images[ticket.key] = _Image(ticket, header, payload, room_bytes, time.monotonic())
            self.num_bytes += room_bytes

    def let_go(self, payload: torch.Tensor) -> None:
        """Give up a payload: its memory goes back once nobody refers to it, its pages are unlocked by `unlock`."""
        if self._lock_pages:
            self._to_unlock.append(payload)

    def unlock(self) -> None:
        """Unlock the pages of what was given up; by the reader's thread, so never under a copy that it makes."""
        while self._to_unlock:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._to_unlock.pop().data_ptr()))

    def drop(self, key: str) -> bool:
        with self._lock:
            if key not in self._images:
                return False
            self._drop(key)
            return True

    def images(self) -> list[HostImage]:
        with self._lock:
            return [
                HostImage(key, image.ticket.name, image.ticket.num_bytes, image.last_used_s)
                for key, image in self._images.items()
            ]

    def _cheapest(self) -> str:
        now_s = time.monotonic()

        def loss(entry: tuple[str, _Image]) -> float:
            units = -(-entry[1].room_bytes // _UNIT_BYTES)
            return self._worth_of(units, entry[1].num_uses, is_near=False) / units / (1 + now_s - entry[1].last_used_s)

        return min(itertools.islice(self._images.items(), _NUM_COMPARED), key=loss)[0]

    def _drop(self, key: str) -> None:
        image = self._images.pop(key)
        self.num_bytes -= image.room_bytes
        self.let_go(image.payload)


def _mapped_bytes(num_bytes: int) -> int:
    return max(1, -(-num_bytes // _PAGE)) * _PAGE
