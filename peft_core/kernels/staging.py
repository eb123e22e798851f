"""Arrays that are written on the host once a step and read on the device at fixed addresses.

Everything that a step must be told (token ids, positions, slots, block tables) is reserved here at start. A step writes
the host halves and calls `flush`, which is one copy to the device on the current stream, whatever the number of arrays.
The device half never moves, so a captured graph may read it.

The copy is not waited for. So the host half is rotated behind an event: after `flush` the views in `Staged.host` are
other memory, whose last copy is over. What a step does not write is therefore not what the step before wrote.

On a CPU the device array is the host array, and `flush` has nothing to do.

Running example: arrays of 3 int32 and 5 int64
    device   [ 12 bytes | 4 unused | 40 bytes ]               one address for life
    host 0   [ the same ]  written by step 0, 3, 6, ...
    host 1   [ the same ]  written by step 1, 4, 7, ...       while the copy of the last may be under way
    host 2   [ the same ]  written by step 2, 5, 8, ...
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT_BYTES = 16
NUM_HOST_HALVES = 3  # the step that is written, the one that waits in the stream, and one that is surely over


class Event(Protocol):
    """A place in a stream."""

    def query(self) -> bool:
        """Whether the stream has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Transport(Protocol):
    """How bytes get to the device; tests put a slower one in its place."""

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Zeros [num_bytes] uint8 that can be copied from without the host's help."""

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Enqueue one copy on the current stream and return the event behind it."""


class CudaTransport:
    """Pinned memory and copies on the current stream."""

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event


class Staged:
    """One reserved array.

    Attributes:
        device: the device half, of the shape and dtype that was reserved.
    """

    def __init__(self, views: list[npt.NDArray[Any]], device: torch.Tensor, turn: _Turn, end_bytes: int) -> None:
        self._views, self._turn = views, turn
        self.device = device
        self._end_bytes = end_bytes
        self._used = len(device)

    @property
    def host(self) -> npt.NDArray[Any]:
        """The half to write for the next `flush`. Ask for it anew in every step: it changes behind each flush."""
        return self._views[self._turn.half]

    def use(self, length: int) -> None:
        """Of the first axis only so much need travel from now on; beyond it the device half may keep what it has.

        Saves time for what is reserved last: `flush` copies from the beginning to the last byte of use.
        """
        assert 0 <= length <= len(self.device), f"{length} of {len(self.device)}"
        self._used = length

    @property
    def used_end_bytes(self) -> int:
        """Where the part of use ends in the buffer."""
        whole = len(self.device)
        if not self._used:
            return 0
        return self._end_bytes - (whole - self._used) * (self.device.nbytes // whole)


class Staging:
    """One device buffer and its host halves.

    Args:
        num_bytes: of all arrays together, `aligned_bytes` each.
        transport: None: what the device has; on a CPU nothing is copied.
    """

    def __init__(self, num_bytes: int, device: torch.device, transport: Transport | None = None) -> None:
        if transport is None and device.type != "cpu":
            transport = CudaTransport()
        self.device, self.num_waits = device, 0
        self._transport = transport
        self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._halves = (
            [self._buffer] if transport is None else [transport.host_buffer(num_bytes) for _ in range(NUM_HOST_HALVES)]
        )
        self._events: list[Event | None] = [None] * len(self._halves)
        self._turn = _Turn()
        self._arrays: list[Staged] = []
        self._reserved_bytes = 0

    def reserve(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Staged:
        """An array of the buffer, at start only. Zeros until somebody writes.

        Raises:
            ValueError: the buffer is full; it was made too small for what is reserved in it.
        """
        kind = np.dtype(dtype)
        num_bytes = int(np.prod(shape)) * kind.itemsize
        first, end = self._reserved_bytes, self._reserved_bytes + num_bytes
        if end > len(self._buffer):
            raise ValueError(f"{end} bytes are to be reserved in a staging buffer of {len(self._buffer)}")
        self._reserved_bytes += aligned_bytes(shape, kind)
        torch_dtype = torch.from_numpy(np.zeros(0, kind)).dtype
        views = [half[first:end].numpy().view(kind).reshape(shape) for half in self._halves]
        staged = Staged(views, self._buffer[first:end].view(torch_dtype).view(shape), self._turn, end)
        self._arrays.append(staged)
        return staged

    def flush(self) -> None:
        """Send what was written, as ONE copy on the current stream; does not wait for it."""
        if self._transport is None:
            return
        end = max((array.used_end_bytes for array in self._arrays), default=0)
        half = self._turn.half
        self._events[half] = self._transport.send(self._halves[half][:end], self._buffer[:end])
        self._turn.half = (half + 1) % len(self._halves)
        before = self._events[self._turn.half]
        if before is not None and not before.query():
            self.num_waits += 1
            before.synchronize()


class _Turn:
    """Which half is written now; shared by a staging and its arrays."""

    def __init__(self) -> None:
        self.half = 0


def aligned_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    """What an array takes of the buffer."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
