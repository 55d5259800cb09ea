"""Where streamed layers are read from: files, or host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from bonsai_fast.checkpoints.joined_tensor import JoinedTensor
from bonsai_fast.checkpoints.safetensors_reader import StoredTensor
from bonsai_fast.checkpoints.streaming.packing import Packing, host_buffer

BLOCK_BYTES = 1 << 24


class LayerSource(Protocol):
    """Gives the weights of a layer as one block of host memory."""

    needs_room: bool

    def read(self, layer: int, packing: Packing, room: Tensor | None) -> Tensor:
        """The packed layer, uint8 [packing.num_bytes].

        Args:
            layer: its index.
            packing: where its tensors belong in the block.
            room: uint8 in host memory, of that size or more, to read into; given if `needs_room`.
        """


class StoredLayers:
    """Layers in memory-mapped safetensors; pages are given back once they are copied.

    Args:
        tensors: of every layer, by their names inside the layer.
    """

    needs_room = True

    def __init__(self, tensors: Sequence[Mapping[str, StoredTensor | JoinedTensor]]) -> None:
        self._tensors = tensors

    def read(self, layer: int, packing: Packing, room: Tensor | None) -> Tensor:
        """See `LayerSource.read`."""
        assert room is not None
        for name, target in packing.views(room).items():
            copy_stored(self._tensors[layer][name], target)
        return room[: packing.num_bytes]


class HostLayers:
    """Layers in host memory, each as one block, so that a GPU copies it in one transfer.

    Args:
        pinned: whether a GPU will copy them.
    """

    needs_room = False

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._layers: list[Tensor] = []

    def append(self, packing: Packing) -> None:
        """Add a copy of the next layer's tensors."""
        flat = host_buffer(packing.num_bytes, pinned=self._pinned)
        for name, target in packing.views(flat).items():
            target.copy_(packing.tensors[name])
        self._layers.append(flat)

    def read(self, layer: int, packing: Packing, room: Tensor | None) -> Tensor:
        """See `LayerSource.read`."""
        return self._layers[layer]


def copy_stored(stored: StoredTensor | JoinedTensor, target: Tensor) -> None:
    """Copy a tensor from its file into one of the same shape, block by block."""
    if not stored.shape:
        target.copy_(next(iter(stored.blocks(BLOCK_BYTES)))[1])
        return
    for first, block in stored.blocks(BLOCK_BYTES):
        target[first : first + len(block)].copy_(block)
