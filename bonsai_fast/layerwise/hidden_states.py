"""The hidden states of all text between two layers, in memory or in an unlinked file."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """[B, T, D] of one dtype, read and written in batches of rows.

    Args:
        shape: B, T and D.
        dtype: of the states.
        device: where batches are returned, and where all of them are kept if there is room.
        room: bytes that they may take there. Otherwise they are kept in a file, which is unlinked
            at once and so removed with the process.
        folder: where that file is made.
    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        device: torch.device,
        room: int,
        folder: Path,
    ) -> None:
        self.device = device
        size = math.prod(shape)
        self.is_in_memory = size * dtype.itemsize <= room
        if self.is_in_memory:
            self._states = torch.empty(shape, dtype=dtype, device=device)
            return
        handle, name = tempfile.mkstemp(prefix=".hidden-states.", dir=folder)
        try:
            # writing to a mapping on a full disk kills the process: reserve the room first
            os.posix_fallocate(handle, 0, size * dtype.itemsize)
            self._states = torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
        finally:
            os.close(handle)
            os.unlink(name)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """[rows, T, D] on the device; may be the states themselves."""
        return self._states[rows].to(self.device)

    def __setitem__(self, rows: slice, states: Tensor) -> None:
        self._states[rows] = states
