"""Memory that is allocated once and reused: buffers by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Buffers on one device; each grows to the largest size requested.

    New memory causes page faults at its first use, which on a CPU cost as much as a small matrix
    product.

    Args:
        like: has the device and dtype of the buffers.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor; it overwrites the tensor that had this name before."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # freed first: the old and the new buffer together would exceed the memory budget
            self._buffers.pop(name, None)
            del buffer
            buffer = self._buffers[name] = self._like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)
