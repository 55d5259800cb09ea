"""Rotary tables and attention masks, which depend on positions only."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.parent import (
    QueryGrowth,
    Rotary,
    Structure,
    UnsupportedStructureError,
)


class Positions:
    """Tables for sequences of one length, without padding.

    Attributes:
        length: T.
    """

    def __init__(self, structure: Structure, length: int) -> None:
        self.length = length
        self._structure, self._device = structure, structure.like.device
        self._angles: dict[str, tuple[Tensor, Tensor]] = {}
        self._exact_angles: dict[str, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int, Tensor] = {}
        self._of_rows: dict[int, Tensor] = {}

    def mask(self, window: int | None) -> Tensor | None:
        """bool [T, T], True where a token (row) attends to another; None for a causal mask."""
        if window is None or window >= self.length:
            return None
        if window not in self._masks:
            place = torch.arange(self.length, device=self._device)
            distance = place[:, None] - place[None, :]
            self._masks[window] = (distance >= 0) & (distance < window)
        return self._masks[window]

    def angles(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Cos and sin, [T, R / 2] each, in the model's dtype; R columns of each head are turned.

        Raises:
            UnsupportedStructureError: the model's tables are not those of R / 2 pairs of columns.
        """
        if rotary.kind not in self._angles:
            self._angles[rotary.kind] = self._read_angles(rotary.kind)
        return self._angles[rotary.kind]

    def exact_angles(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """The same in float32."""
        if rotary.kind not in self._exact_angles:
            cos, sin = self.angles(rotary)
            self._exact_angles[rotary.kind] = cos.float(), sin.float()
        return self._exact_angles[rotary.kind]

    def query_factors(self, growth: QueryGrowth | None) -> Tensor | None:
        """[T] in the model's dtype, the factor of the queries of each token; None: all are 1."""
        if growth is None or self.length <= growth.length:
            return None
        places = torch.arange(self.length, device=self._device)
        factors = 1 + growth.beta * torch.log(1 + torch.floor(places / growth.length))
        return factors.to(self._structure.like.dtype)

    def of_rows(self, rows: int) -> Tensor:
        """int64 [R * T], the position of every token of R consecutive rows."""
        if rows not in self._of_rows:
            self._of_rows = {rows: torch.arange(self.length, device=self._device).repeat(rows)}
        return self._of_rows[rows]

    def _read_angles(self, kind: str) -> tuple[Tensor, Tensor]:
        structure = self._structure
        places = torch.arange(self.length, device=self._device)[None]
        kinds = (kind,) if structure.rotary_kinds else ()
        found = structure.rotary(structure.like.new_zeros(1, self.length, 1), places, *kinds)
        if not isinstance(found, tuple) or len(found) != 2:
            raise UnsupportedStructureError(
                f"expected cos and sin from {type(structure.rotary).__name__}"
            )
        cos, sin = (_half(table.to(structure.like.dtype)) for table in found)
        return cos, sin


def _half(table: Tensor) -> Tensor:
    """[1, T, R], in which every angle occurs twice, -> [T, R / 2]."""
    columns = table.shape[-1]
    if table.dim() == 3 and len(table) == 1 and columns % 2 == 0:
        halves, pairs = table[0].view(-1, 2, columns // 2), table[0].view(-1, columns // 2, 2)
        for once, again in (halves.unbind(1), pairs.unbind(2)):
            if torch.equal(once, again):
                return once.contiguous()
    raise UnsupportedStructureError("expected rotary tables with every angle twice")
