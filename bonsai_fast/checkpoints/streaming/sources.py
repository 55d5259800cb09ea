"""Where a streamed layer comes from: files, or host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from bonsai_fast.checkpoints.safetensors_reader import StoredTensor
from bonsai_fast.checkpoints.streaming.packing import Packing, host_buffer

BLOCK_BYTES = 1 << 24


class LayerSource(Protocol):
    """Gives the weights of a layer as one stretch of host memory."""

    needs_room: bool

    def read(self, layer: int, packing: Packing, room: Tensor | None) -> Tensor:
        """The packed layer, uint8 [packing.num_bytes].

        Args:
            layer: its index.
            packing: where its tensors are to lie.
            room: uint8 on the host, as large as the result, which may be put there; given if
                `needs_room`.
        """


class StoredLayers:
    """Layers in memory-mapped safetensors; what was read is let go of.

    Args:
        tensors: for every layer, its tensors by their names inside the layer.
    """

    needs_room = True

    def __init__(self, tensors: Sequence[Mapping[str, StoredTensor]]) -> None:
        self._tensors = tensors

    def read(self, layer: int, packing: Packing, room: Tensor | None) -> Tensor:
        """See `LayerSource.read`."""
        assert room is not None
        for name, target in packing.views(room).items():
            copy_stored(self._tensors[layer][name], target)
        return room[: packing.num_bytes]


class HostLayers:
    """Layers in the memory of the host, each in one piece, so that a GPU fetches it in one go.

    Args:
        pinned: whether a GPU is going to fetch them.
    """

    needs_room = False

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._layers: list[Tensor] = []

    def append(self, packing: Packing) -> None:
        """Take a copy of the next layer's tensors."""
        flat = host_buffer(packing.num_bytes, pinned=self._pinned)
        for name, target in packing.views(flat).items():
            target.copy_(packing.tensors[name])
        self._layers.append(flat)

    def read(self, layer: int, packing: Packing, room: Tensor | None) -> Tensor:
        """See `LayerSource.read`."""
        return self._layers[layer]


def copy_stored(stored: StoredTensor, target: Tensor) -> None:
    """Copy a tensor out of its file, a block at a time, into one of the same shape."""
    if not stored.shape:
        target.copy_(next(iter(stored.blocks(BLOCK_BYTES)))[1])
        return
    for first, block in stored.blocks(BLOCK_BYTES):
        target[first : first + len(block)].copy_(block)
