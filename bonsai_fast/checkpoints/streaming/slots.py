"""Memory for one layer on the device that computes, filled in the background.

The thread that computes calls `release` and `wait`, a background thread `fill`, in that order:

    release   what was queued so far may still read the slot; `fill` waits for it
    fill      puts a layer there
    wait      what is queued from now on finds the layer there
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bonsai_fast.checkpoints.streaming.packing import host_buffer

# given room or None on the host: the packed layer
Read = Callable[[Tensor | None], Tensor]


class CpuSlot:
    """On the CPU everything happens when it is called for."""

    def __init__(self, num_bytes: int) -> None:
        self.flat = host_buffer(num_bytes, pinned=False)

    def release(self) -> None:
        """Nothing is ever queued."""

    def fill(self, read: Read) -> None:
        """Read straight into the slot."""
        found = read(self.flat)
        if found.data_ptr() != self.flat.data_ptr():
            self.flat[: len(found)].copy_(found)

    def wait(self) -> None:
        """It is there."""


class CudaSlot:
    """Copies run on a stream of their own, beside what is computed.

    The slot's memory is used again and again, never freed while the stream is at work, so that
    events alone keep reading and writing apart.

    Args:
        num_bytes: of the largest layer.
        device: a CUDA device.
        stream: for copies, shared by all slots.
        staged: whether layers pass through pinned memory of this slot.
    """

    def __init__(
        self, num_bytes: int, device: torch.device, stream: torch.cuda.Stream, *, staged: bool
    ) -> None:
        self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._device, self._stream = device, stream
        self._room = host_buffer(num_bytes, pinned=True) if staged else None
        self._released, self._filled = torch.cuda.Event(), torch.cuda.Event()

    def release(self) -> None:
        """Mark how far the computation has come."""
        self._released.record(torch.cuda.current_stream(self._device))

    def fill(self, read: Read) -> None:
        """Read into pinned memory, once its last copy has left, and queue the next copy."""
        if self._room is not None:
            self._filled.synchronize()
        found = read(self._room)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._released)
            self.flat[: len(found)].copy_(found, non_blocking=True)
            self._filled.record(self._stream)

    def wait(self) -> None:
        """Let the computation wait for the copy."""
        torch.cuda.current_stream(self._device).wait_event(self._filled)


Slot = CpuSlot | CudaSlot


def make_slots(count: int, num_bytes: int, device: torch.device, *, staged: bool) -> list[Slot]:
    """Slots on one device.

    Args:
        count: how many.
        num_bytes: of the largest layer.
        device: where.
        staged: whether layers must be put into host memory before a GPU can fetch them.
    """
    if device.type != "cuda":
        return [CpuSlot(num_bytes) for _ in range(count)]
    stream = torch.cuda.Stream(device)
    return [CudaSlot(num_bytes, device, stream, staged=staged) for _ in range(count)]
