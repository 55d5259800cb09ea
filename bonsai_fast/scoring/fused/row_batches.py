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
    """

    def __init__(self, states: Tensor, chunk_rows: int, arithmetic: Arithmetic) -> None:
        self._states, self._arithmetic = states, arithmetic
        self._rows = states.flatten(0, 1)  # [leaves * B, T, D]
        self.chunk_rows = chunk_rows

    def of_slot(self, slot: int) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of one slot: which sequences, and a view of their states [R, T, D]."""
        sequences = self._states.shape[1]
        for begin in range(0, sequences, self.chunk_rows):
            here = slice(begin, min(begin + self.chunk_rows, sequences))
            yield here, self._states[slot, here]

    def of_branches(self, branches: list[Branch]) -> Iterator[tuple[Tensor, list[int]]]:
        """Chunks of several slots: states [R, T, D], and the number of each row's mask.

        Update the states in place; they are stored before the next chunk.
        """
        sequences = self._states.shape[1]
        rows = [slot * sequences + number for slot, _ in branches for number in range(sequences)]
        for begin in range(0, len(rows), self.chunk_rows):
            chunk = rows[begin : begin + self.chunk_rows]
            masks = [branches[(begin + place) // sequences].mask for place in range(len(chunk))]
            if chunk == list(range(chunk[0], chunk[0] + len(chunk))):
                yield self._rows[chunk[0] : chunk[-1] + 1], masks
                continue
            index = torch.tensor(chunk, device=self._rows.device)
            source = self._arithmetic.buffer("gathered", len(chunk), *self._rows.shape[1:])
            torch.index_select(self._rows, 0, index, out=source)
            yield source, masks
            self._rows.index_copy_(0, index, source)
