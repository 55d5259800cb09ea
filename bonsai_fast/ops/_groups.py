"""What CPU paths over grouped rows share."""

from __future__ import annotations

from torch import Tensor


def group_rows(tiles: Tensor) -> list[tuple[int, int, int]]:
    """Every sub-model that the tiles of a `RowPlan` cover, its first row and one past its last."""
    runs: list[tuple[int, int, int]] = []
    for group, begin, end in tiles.tolist():
        if runs and runs[-1][0] == group:
            begin = runs.pop()[1]
        runs.append((group, begin, end))
    return runs


def add(product: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """What follows an output projection; `product` is overwritten."""
    if bias is not None:
        product += bias
    if residual is not None:
        product += residual
    return product
