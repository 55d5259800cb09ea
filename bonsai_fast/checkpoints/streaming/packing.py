"""Where the tensors of a layer lie when they lie in one stretch of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# what matrix products like best, on CPUs and GPUs
ALIGNMENT = 256


@dataclass(frozen=True, eq=False)
class Packing:
    """The tensors of one layer, one behind the other.

    Attributes:
        tensors: of the right shape and dtype, on any device, by name; on meta will do.
        offsets: where each begins, in bytes.
        num_bytes: of all.
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
        """The tensors inside a buffer.

        Args:
            flat: uint8 [at least num_bytes].
        """
        return {
            name: flat[self.offsets[name] :][: tensor.numel() * tensor.element_size()]
            .view(tensor.dtype)
            .view(tensor.shape)
            for name, tensor in self.tensors.items()
        }


def host_buffer(num_bytes: int, *, pinned: bool) -> Tensor:
    """uint8 [num_bytes] on the host; pinned, so that a GPU fetches it by itself."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
