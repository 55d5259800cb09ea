"""Masks of the rows that go through a sub-layer together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# a row on which no mask is put: all is kept, or what is not has been sliced away
WHOLE = -1


@dataclass(frozen=True, eq=False)
class RowMasks:
    """Which parts every row keeps.

    Attributes:
        keep: bool [K, parts], different masks; may be more than the rows have.
        mask_of_row: int64 [R], which of them each row has.
        part_width: columns of the output projection that a part feeds.
    """

    keep: Tensor
    mask_of_row: Tensor
    part_width: int

    def zero_removed(self, inputs: Tensor) -> Tensor:
        """Zero what each row of [R, T, columns] does not keep, in place."""
        removed = ~self.keep[self.mask_of_row]
        if self.part_width > 1:
            removed = removed.repeat_interleave(self.part_width, dim=-1)
        # selected, not multiplied: NaN or Inf in a removed unit must not survive as NaN * 0
        return inputs.masked_fill_(removed[:, None], 0)

    def mask_of_token(self, length: int) -> Tensor:
        """int32 [R * T], the mask of every token of rows of T tokens."""
        return self.mask_of_row.to(torch.int32).repeat_interleave(length)


class MaskTable:
    """Different masks of a sub-layer, moved to the device once.

    Args:
        numbers: what the masks are called; WHOLE needs no mention.
        keep: bool [numbers, parts] on the CPU.
        part_width: columns of the output projection that a part feeds.
        device: where rows are.
    """

    def __init__(
        self, numbers: Sequence[int], keep: Tensor, part_width: int, device: torch.device
    ) -> None:
        everything = torch.ones(1, keep.shape[1], dtype=torch.bool)
        self._keep = torch.cat([keep, everything]).to(device)
        self._place = {number: place for place, number in enumerate([*numbers, WHOLE])}
        self._part_width = part_width

    def of_rows(self, masks: Sequence[int]) -> RowMasks | None:
        """Masks of rows by number; None if nothing is removed from any."""
        if all(mask == WHOLE for mask in masks):
            return None
        places = torch.tensor([self._place[mask] for mask in masks], device=self._keep.device)
        return RowMasks(self._keep, places, self._part_width)
