"""In which order a training run reads its sequences."""

from __future__ import annotations

import torch
from torch import Tensor


class TextOrder:
    """Epoch after epoch, each in an order of its own that depends on the seed alone.

    Args:
        sequences: number of sequences of the text.
        seed: of the orders.
    """

    def __init__(self, sequences: int, seed: int) -> None:
        self._sequences, self._seed = sequences, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, places: range) -> Tensor:
        """Numbers of the sequences at these places, counted over all epochs: int64 [len]."""
        found = []
        for place in places:
            epoch, position = divmod(place, self._sequences)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
                self._order = torch.randperm(self._sequences, generator=generator)
                self._epoch = epoch
            found.append(int(self._order[position]))
        return torch.tensor(found, dtype=torch.int64)
