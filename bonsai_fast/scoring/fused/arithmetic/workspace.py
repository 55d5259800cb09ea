"""Memory that is taken once and used again: buffers by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Buffers on one device; each grows to the largest shape that was asked for.

    Fresh memory costs page faults at every use, which on a CPU take as long as a small product.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of this shape; one that had the name before is overwritten."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # freed first: old and new together would exceed what was planned for
            self._buffers.pop(name, None)
            del buffer
            buffer = self._buffers[name] = self._like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)
