"""X^T Y where the result is symmetric: only the upper triangle is computed, in blocks."""

from __future__ import annotations

from torch import Tensor

# blocks of rows; with 8 of them, 9/16 of the products are computed
BLOCKS = 8
# narrower matrices are multiplied as a whole
NARROW = 512


def add_symmetric_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to the upper triangle of blocks; `mirror` fills the lower one in the end.

    Args:
        total: [n, n].
        left, right: [N, n] of the same dtype; left^T right must be symmetric.
    """
    for start, stop in _blocks(len(total)):
        total[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])


def mirror(total: Tensor) -> Tensor:
    """Copy the upper triangle of blocks to the lower one, in place; returns `total`."""
    for start, stop in _blocks(len(total)):
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _blocks(size: int) -> list[tuple[int, int]]:
    if size < NARROW:
        return [(0, size)]
    step = -(-size // BLOCKS)
    return [(start, min(start + step, size)) for start in range(0, size, step)]
