"""What the CPU paths of several ops share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS`, element by element."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def group_rows(tiles: Tensor) -> list[tuple[int, int, int]]:
    """Sub-model, first row and one past its last row, for every sub-model in `RowPlan.tiles`."""
    runs: list[tuple[int, int, int]] = []
    for group, begin, end in tiles.tolist():
        if runs and runs[-1][0] == group:
            begin = runs.pop()[1]
        runs.append((group, begin, end))
    return runs


def add(product: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Add the bias [N] and the residual [T, N], where given, to a projection's output, in place."""
    if bias is not None:
        product += bias
    if residual is not None:
        product += residual
