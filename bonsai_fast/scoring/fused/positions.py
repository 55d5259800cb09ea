"""Rotary tables and attention masks, which depend on positions only."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.parent import Structure, UnsupportedStructureError


class Positions:
    """Tables for sequences of one length, without padding.

    Attributes:
        length: T.
        cos, sin: [T, R / 2] in the model's dtype; the first R columns of each head are rotated.
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
        """bool [T, T], True where a token (row) attends to another; None for a causal mask."""
        if window is None or window >= self.length:
            return None
        if window not in self._masks:
            place = torch.arange(self.length, device=self.cos.device)
            distance = place[:, None] - place[None, :]
            self._masks[window] = (distance >= 0) & (distance < window)
        return self._masks[window]

    @cached_property
    def exact_tables(self) -> tuple[Tensor, Tensor]:
        """The same cos and sin in float32."""
        return self.cos.float(), self.sin.float()

    def of_rows(self, rows: int) -> Tensor:
        """int64 [R * T], the position of every token of R consecutive rows."""
        if rows not in self._of_rows:
            self._of_rows = {rows: torch.arange(self.length, device=self.cos.device).repeat(rows)}
        return self._of_rows[rows]
