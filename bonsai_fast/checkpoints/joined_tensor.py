"""The weights of all experts of a layer as one tensor, stored as a matrix for each expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bonsai_fast.checkpoints.safetensors_reader import StoredTensor


@dataclass(frozen=True, eq=False)
class JoinedTensor:
    """A tensor [E, rows, columns] in parts; it is read like a `StoredTensor`.

    Attributes:
        experts: for each expert the matrices that make its own when put below one another.
    """

    experts: tuple[tuple[StoredTensor, ...], ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.experts[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        parts = self.experts[0]
        return len(self.experts), sum(part.shape[0] for part in parts), *parts[0].shape[1:]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for parts in self.experts for part in parts)

    def blocks(self, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """Pairs of (number of an expert, its matrix as [1, rows, columns]), in order."""
        for expert in range(len(self.experts)):
            yield expert, self.row(expert, max_bytes)[None]

    def row(self, expert: int, max_bytes: int) -> Tensor:
        """The matrix of one expert; at most `max_bytes` of its files are in memory beside it."""
        found = torch.empty(self.shape[1:], dtype=self.dtype)
        start = 0
        for part in self.experts[expert]:
            for first, block in part.blocks(max_bytes):
                found[start + first : start + first + len(block)] = block
            start += part.shape[0]
        return found
