"""Memory for one layer on the device that computes, filled by a background thread.

The computing thread calls `release` and `wait`, the background thread `fill`, in this order:

    release   work queued until now may still read the slot; `fill` waits for it
    fill      puts a layer into the slot
    wait      work queued from now on reads that layer
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bonsai_fast.checkpoints.streaming.packing import host_buffer

# host memory that may be used, or None -> the packed layer in host memory
Read = Callable[[Tensor | None], Tensor]


class CpuSlot:
    """A slot on the CPU, where nothing is queued."""

    def __init__(self, num_bytes: int) -> None:
        self.flat = host_buffer(num_bytes, pinned=False)

    def release(self) -> None:
        """Does nothing."""

    def fill(self, read: Read) -> None:
        """Read straight into the slot."""
        found = read(self.flat)
        if found.data_ptr() != self.flat.data_ptr():
            self.flat[: len(found)].copy_(found)

    def wait(self) -> None:
        """Does nothing."""


class CudaSlot:
    """A slot on a GPU; copies run on their own stream, parallel to the computation.

    The memory is reused and never freed, so events are enough to keep reads and writes apart.

    Args:
        num_bytes: of the largest layer.
        device: a CUDA device.
        stream: for copies, shared by all slots.
        staged: whether layers are read into pinned memory of this slot first.
    """

    def __init__(
        self, num_bytes: int, device: torch.device, stream: torch.cuda.Stream, *, staged: bool
    ) -> None:
        self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._device, self._stream = device, stream
        self._room = host_buffer(num_bytes, pinned=True) if staged else None
        self._released, self._filled = torch.cuda.Event(), torch.cuda.Event()

    def release(self) -> None:
        """Mark the work that may still read the slot."""
        self._released.record(torch.cuda.current_stream(self._device))

    def fill(self, read: Read) -> None:
        """Wait until pinned memory is free, read into it, and queue the copy to the GPU."""
        if self._room is not None:
            self._filled.synchronize()
        found = read(self._room)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._released)
            self.flat[: len(found)].copy_(found, non_blocking=True)
            self._filled.record(self._stream)

    def wait(self) -> None:
        """Make the computation wait for the copy."""
        torch.cuda.current_stream(self._device).wait_event(self._filled)


Slot = CpuSlot | CudaSlot


def make_slots(count: int, num_bytes: int, device: torch.device, *, staged: bool) -> list[Slot]:
    """Slots on one device.

    Args:
        count: number of slots.
        num_bytes: of the largest layer.
        device: where layers are computed.
        staged: whether layers must be read into host memory before a GPU can copy them.
    """
    if device.type != "cuda":
        return [CpuSlot(num_bytes) for _ in range(count)]
    stream = torch.cuda.Stream(device)
    return [CudaSlot(num_bytes, device, stream, staged=staged) for _ in range(count)]
