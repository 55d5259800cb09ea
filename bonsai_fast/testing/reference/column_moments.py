"""Statistics of channels, naively."""

from __future__ import annotations

import torch
from torch import Tensor


def column_moments_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of squares, sum of magnitudes, sum and largest magnitude of each column.

    Args:
        x: [T, C].

    Returns:
        Three of [C] float64, one of [C] float32.
    """
    exact = x.double()
    zero = exact.new_zeros(1, x.shape[1])
    largest = torch.cat([zero, exact.abs()]).amax(dim=0)
    return exact.square().sum(0), exact.abs().sum(0), exact.sum(0), largest.float()
