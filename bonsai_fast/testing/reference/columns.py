"""Statistics of channels, and copies of the kept ones, naively."""

from __future__ import annotations

import torch
from torch import Tensor


def column_moments_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of squares, sum of magnitudes, sum and largest magnitude of every column.

    Args:
        x: [T, C].

    Returns:
        Three of [C] float64, one of [C] float32.
    """
    exact = x.double()
    zero = exact.new_zeros(1, x.shape[1])
    largest = torch.cat([zero, exact.abs()]).amax(dim=0)
    return exact.square().sum(0), exact.abs().sum(0), exact.sum(0), largest.float()


def compact_rows_reference(source: Tensor, index: Tensor, num_places: int) -> Tensor:
    """The rows of `index`, then zeros: [num_places, C]."""
    out = torch.zeros(num_places, source.shape[1], dtype=source.dtype, device=source.device)
    for place, row in enumerate(index.tolist()):
        out[place] = source[row]
    return out


def compact_columns_reference(source: Tensor, index: Tensor, num_places: int) -> Tensor:
    """The columns of `index`, then zeros: [R, num_places]."""
    return compact_rows_reference(source.T, index, num_places).T.contiguous()
