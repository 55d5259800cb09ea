"""The hidden states of a wave as rows, in chunks that a sub-layer computes at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.mask_tree import Branch


class RowBatches:
    """Cuts (sub-model, sequence) pairs into chunks.

    Args:
        states: [leaves, B, T, D], contiguous; the first dimension is slots.
        chunk_rows: number of pairs in a chunk.
        arithmetic: has the buffer for rows that are not adjacent.
        inputs: [leaves, B, T, D], what the sub-layer reads, if that is not `states`.
    """

    def __init__(
        self,
        states: Tensor,
        chunk_rows: int,
        arithmetic: Arithmetic,
        inputs: Tensor | None = None,
    ) -> None:
        self._states, self._arithmetic = states, arithmetic
        self._inputs = states if inputs is None else inputs
        self.chunk_rows = chunk_rows

    def of_slot(self, slot: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Chunks of one slot: which sequences, views of their states and of their inputs."""
        sequences = self._states.shape[1]
        for begin in range(0, sequences, self.chunk_rows):
            here = slice(begin, min(begin + self.chunk_rows, sequences))
            yield here, self._states[slot, here], self._inputs[slot, here]

    def of_branches(self, branches: list[Branch]) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Chunks of several slots: states and inputs [R, T, D], and the number of each row's mask.

        Update the states in place; they are stored before the next chunk.
        """
        states, inputs = self._states.flatten(0, 1), self._inputs.flatten(0, 1)
        sequences = self._states.shape[1]
        numbers = [slot * sequences + row for slot, _ in branches for row in range(sequences)]
        for begin in range(0, len(numbers), self.chunk_rows):
            chunk = numbers[begin : begin + self.chunk_rows]
            masks = [branches[(begin + place) // sequences].mask for place in range(len(chunk))]
            if chunk == list(range(chunk[0], chunk[0] + len(chunk))):
                here = slice(chunk[0], chunk[-1] + 1)
                yield states[here], inputs[here], masks
                continue
            index = torch.tensor(chunk, device=states.device)
            rows = self._taken("gathered", states, index)
            read = rows
            if self._inputs is not self._states:
                read = self._taken("gathered inputs", inputs, index)
            yield rows, read, masks
            states.index_copy_(0, index, rows)

    def _taken(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        found = self._arithmetic.buffer(name, len(index), *rows.shape[1:])
        return torch.index_select(rows, 0, index, out=found)
