"""Masks of the rows that a sub-layer computes in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# number of a mask that keeps everything, e.g. of weights that were sliced before
WHOLE = -1


@dataclass(frozen=True, eq=False)
class RowMasks:
    """Which parts every row keeps.

    Attributes:
        keep: bool [K, parts], different masks; some may belong to no row.
        mask_of_row: int64 [R], the mask of each row.
        part_width: columns of the output projection that a part feeds.
    """

    keep: Tensor
    mask_of_row: Tensor
    part_width: int

    def zero_removed(self, inputs: Tensor) -> Tensor:
        """Zero in place what each row of [R, T, columns] does not keep."""
        removed = ~self.keep[self.mask_of_row]
        if self.part_width > 1:
            removed = removed.repeat_interleave(self.part_width, dim=-1)
        # selected, not multiplied: NaN or Inf in a removed unit would survive as NaN * 0
        return inputs.masked_fill_(removed[:, None], 0)

    def mask_of_token(self, length: int) -> Tensor:
        """The mask of every token: int32 [R * T], for rows of T tokens."""
        return self.mask_of_row.to(torch.int32).repeat_interleave(length)


class MaskTable:
    """The different masks of a sub-layer, moved to the device once.

    Args:
        numbers: of the masks; WHOLE is added.
        keep: bool [numbers, parts] on the CPU, what each mask keeps.
        part_width: columns of the output projection that a part feeds.
        device: of the rows.
    """

    def __init__(
        self, numbers: Sequence[int], keep: Tensor, part_width: int, device: torch.device
    ) -> None:
        everything = torch.ones(1, keep.shape[1], dtype=torch.bool)
        self._keep = torch.cat([keep, everything]).to(device)
        self._place = {number: place for place, number in enumerate([*numbers, WHOLE])}
        self._part_width = part_width

    def of_rows(self, masks: Sequence[int]) -> RowMasks | None:
        """Masks of rows, by number; None if no row has anything removed."""
        if all(mask == WHOLE for mask in masks):
            return None
        places = torch.tensor([self._place[mask] for mask in masks], device=self._keep.device)
        return RowMasks(self._keep, places, self._part_width)
