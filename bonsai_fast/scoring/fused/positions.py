"""What depends on positions alone: rotary tables and attention masks, once per length."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.parent import Structure, UnsupportedStructureError


class Positions:
    """Tables for sequences of one length, without padding.

    Attributes:
        length: T.
        cos, sin: [T, R / 2] in the model's dtype; R leading columns of each head are rotated.
    """

    def __init__(self, structure: Structure, length: int) -> None:
        weight = structure.norm.weight
        places = torch.arange(length, device=weight.device)[None]
        cos, sin = structure.rotary(weight.new_zeros(1, length, 1), places)
        self.length = length
        self.cos, self.sin = (
            table[0, :, : table.shape[-1] // 2].contiguous() for table in (cos, sin)
        )
        for half, table in ((self.cos, cos), (self.sin, sin)):
            if not torch.equal(torch.cat([half, half], dim=-1), table[0]):
                raise UnsupportedStructureError("expected rotary tables of two equal halves")
        self._masks: dict[int, Tensor] = {}
        self._of_rows: dict[int, Tensor] = {}

    def mask(self, window: int | None) -> Tensor | None:
        """Who sees whom, bool [T, T]; None where causality alone tells."""
        if window is None or window >= self.length:
            return None
        if window not in self._masks:
            place = torch.arange(self.length, device=self.cos.device)
            distance = place[:, None] - place[None, :]
            self._masks[window] = (distance >= 0) & (distance < window)
        return self._masks[window]

    @cached_property
    def exact_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin in float32, of the same values."""
        return self.cos.float(), self.sin.float()

    def of_rows(self, rows: int) -> Tensor:
        """int64 [R * T], the place of every token in rows that lie below each other."""
        if rows not in self._of_rows:
            self._of_rows = {rows: torch.arange(self.length, device=self.cos.device).repeat(rows)}
        return self._of_rows[rows]
