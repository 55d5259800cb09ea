"""The tensors of a layer as one block of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# bytes: matrix products are fastest on aligned operands, on CPUs and GPUs
ALIGNMENT = 256


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each tensor of a layer is in the block.

    Attributes:
        tensors: by name, of the right shape and dtype, on any device, also meta.
        offsets: where each begins, in bytes.
        num_bytes: size of the block.
    """

    tensors: Mapping[str, Tensor]
    offsets: Mapping[str, int]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Packing:
        """Pack tensors in their order."""
        offsets, end = {}, 0
        for name, tensor in tensors.items():
            offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
            end = offsets[name] + tensor.numel() * tensor.element_size()
        return cls(tensors, offsets, end)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors as views of a block.

        Args:
            flat: uint8 [num_bytes or more].
        """
        return {
            name: flat[self.offsets[name] :][: tensor.numel() * tensor.element_size()]
            .view(tensor.dtype)
            .view(tensor.shape)
            for name, tensor in self.tensors.items()
        }


def host_buffer(num_bytes: int, *, pinned: bool) -> Tensor:
    """uint8 [num_bytes] in host memory; pinned if a GPU is to copy it asynchronously."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
