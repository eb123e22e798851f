"""Staged arrays: one copy a step, host halves that the copy of the last step still reads, fixed device addresses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_core.kernels import staging as staging_module
from peft_core.kernels.staging import Staging, aligned_bytes

CPU = torch.device("cpu")


class LateCopy:
    """An event whose copy happens when it is waited for, or when the test says so: the latest that a stream may."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.source, self.target, self.is_done = source, target, False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        if not self.is_done:
            self.target.copy_(self.source)
            self.is_done = True


class LateTransport:
    def __init__(self) -> None:
        self.copies: list[LateCopy] = []

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def send(self, source: torch.Tensor, target: torch.Tensor) -> LateCopy:
        self.copies.append(LateCopy(source, target))
        return self.copies[-1]


def test_arrays_do_not_overlap_and_are_aligned() -> None:
    shapes = [((3,), np.int32), ((5,), np.int64), ((2, 3), np.float32), ((1,), np.bool_), ((4,), np.int32)]
    staging = Staging(sum(aligned_bytes(shape, dtype) for shape, dtype in shapes), CPU)
    arrays = [staging.reserve(shape, dtype) for shape, dtype in shapes]
    for index, array in enumerate(arrays):
        array.host[...] = index
        assert array.device.data_ptr() % staging_module.ALIGNMENT_BYTES == 0
    staging.flush()
    for index, (array, (shape, dtype)) in enumerate(zip(arrays, shapes, strict=True)):
        assert array.device.shape == shape
        assert array.device.numpy().dtype == dtype
        assert (array.device.numpy() == np.array(index, dtype)).all()
    with pytest.raises(ValueError, match="staging buffer"):
        staging.reserve((1,), np.int32)


def test_on_a_cpu_the_device_reads_what_the_host_wrote() -> None:
    staging = Staging(64, CPU)
    array = staging.reserve((4,), np.int64)
    array.host[:] = 7
    assert array.device.tolist() == [7] * 4
    assert array.host is array.host


def steps_with_late_copies(num_steps: int) -> list[list[int]]:
    """What the device holds when step n runs, which is when step n+1 has been written and flushed."""
    transport = LateTransport()
    staging = Staging(32, CPU, transport)
    array = staging.reserve((4,), np.int64)
    address, seen = array.device.data_ptr(), []
    for step in range(num_steps + 1):
        array.host[:] = step
        staging.flush()
        if step:
            transport.copies[step - 1].synchronize()  # the stream gets there now
            seen.append(array.device.tolist())
    assert len(transport.copies) == num_steps + 1
    assert array.device.data_ptr() == address
    return seen


def test_a_step_may_be_written_while_the_copy_of_the_last_is_in_flight() -> None:
    assert steps_with_late_copies(7) == [[step] * 4 for step in range(7)]


def test_a_single_half_would_be_overwritten_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without rotation, and without its waits, a step runs on the numbers of the next."""
    monkeypatch.setattr(staging_module, "NUM_HOST_HALVES", 1)
    monkeypatch.setattr(LateCopy, "query", lambda self: True)
    assert steps_with_late_copies(3) != [[step] * 4 for step in range(3)]


def test_nothing_is_waited_for_while_the_device_is_a_step_behind_and_everything_when_it_stands_still() -> None:
    transport = LateTransport()
    staging = Staging(32, CPU, transport)
    array = staging.reserve((4,), np.int64)
    for step in range(6):
        array.host[:] = step
        staging.flush()
        if step:
            transport.copies[step - 1].synchronize()
    assert staging.num_waits == 0
    for _ in range(4):
        staging.flush()
    assert staging.num_waits > 0


def test_only_the_used_prefix_travels() -> None:
    transport = LateTransport()
    staging = Staging(aligned_bytes((4,), np.int32) + aligned_bytes((8, 100), np.int32), CPU, transport)
    few, table = staging.reserve((4,), np.int32), staging.reserve((8, 100), np.int32)
    for rows, expected in ((8, 16 + 3200), (2, 16 + 800), (0, 16)):
        table.use(rows)
        few.host[:], table.host[:] = rows, rows
        staging.flush()
        assert len(transport.copies[-1].source) == expected
        transport.copies[-1].synchronize()
        assert (few.device.numpy() == rows).all()
        assert (table.device.numpy()[:rows] == rows).all()
    assert (table.device.numpy()[2:] == 8).all()
