"""Copies of kept rows and columns, naively."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_rows_reference(source: Tensor, index: Tensor, num_places: int) -> Tensor:
    """The rows of `index`, then zeros.

    Args:
        source: [R, C].
        index: int [n] in 0..R-1.
        num_places: n or more.

    Returns:
        [num_places, C].
    """
    out = torch.zeros(num_places, source.shape[1], dtype=source.dtype, device=source.device)
    for place, row in enumerate(index.tolist()):
        out[place] = source[row]
    return out


def compact_columns_reference(source: Tensor, index: Tensor, num_places: int) -> Tensor:
    """The same of columns: [R, C] -> [R, num_places]."""
    return compact_rows_reference(source.T, index, num_places).T.contiguous()
