"""Which parts of a sub-layer's output depend on which numbers, by gradients that are not zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOBODY, MANY = -1, -2
# Smaller gradients than this share of the largest are rounding errors.
ROUNDING = 1e-6


def influence(outputs: Tensor, columns: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """How much some columns depend on some tensors, as shares of the largest gradient.

    Args:
        outputs: [N, C].
        columns: bool [C].
        sources: tensors of the graph.
    Returns:
        a tensor >= 0 like each of them; infinite where a gradient is NaN.
    """
    weights = torch.linspace(1.0, 2.0, outputs.numel()).view_as(outputs)
    loss = (outputs * weights)[:, columns].sum()
    if not loss.requires_grad:
        return [torch.zeros_like(source) for source in sources]
    known = [source for source in sources if source.requires_grad]
    gradients = torch.autograd.grad(
        loss, known, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    largest = max((gradient.abs().max().item() for gradient in gradients), default=0) or 1.0
    shares = {
        id(source): (gradient.abs() / largest).nan_to_num(float("inf"))
        for source, gradient in zip(known, gradients, strict=True)
    }
    return [shares.get(id(source), torch.zeros_like(source)) for source in sources]


def depends(outputs: Tensor, columns: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """Where some columns depend on some tensors: bool, like each of them."""
    return [found > ROUNDING for found in influence(outputs, columns, sources)]


class Bits(NamedTuple):
    """For every element of a tensor, what the columns that read it have in common.

    Attributes:
        ones: int64, bit b is set if a column whose number has bit b reads the element.
        zeros: the same for columns whose number has not.
    """

    ones: Tensor
    zeros: Tensor

    def __or__(self, other: Bits) -> Bits:
        return Bits(self.ones | other.ones, self.zeros | other.zeros)

    def only_reader(self, columns: int) -> Tensor:
        """int64: the one column that reads the element; NOBODY or MANY where there is none."""
        every = (1 << _num_bits(columns)) - 1
        read = self.ones | self.zeros
        one = (read == every) & (self.ones & self.zeros == 0)
        return torch.where(one, self.ones, torch.where(read == 0, NOBODY, MANY))


def reader_bits(outputs: Tensor, sources: Sequence[Tensor]) -> list[Bits]:
    """Which columns read which elements, in 2 log2(C) backward passes.

    Args:
        outputs: [N, C].
        sources: tensors of the graph.
    """
    columns = outputs.shape[1]
    numbers = torch.arange(columns)
    zeros = [torch.zeros(source.shape, dtype=torch.int64) for source in sources]
    found = [Bits(zero.clone(), zero.clone()) for zero in zeros]
    for bit in range(_num_bits(columns)):
        is_set = (numbers >> bit) & 1 == 1
        for place, part in ((0, is_set), (1, ~is_set)):
            for bits, read in zip(found, depends(outputs, part, sources), strict=True):
                bits[place].bitwise_or_(read.long() << bit)
    return found


def _num_bits(columns: int) -> int:
    return max(1, (columns - 1).bit_length())
