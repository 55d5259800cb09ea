"""Hooks by which rows of a batch pass their own output projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bonsai_fast.models import Block
from bonsai_fast.ops.native import take
from bonsai_fast.scoring.output_weights import SubmodelOutputs, checked


class OutputHooks:
    """Computes the output projection of a sub-layer for the rows of a batch that have their own.

    The module computes the other rows alone. Projections are made one at a time.

    Args:
        block: the sub-layer.
        keep: bool [R, parts] on the CPU, what each row keeps.
        outputs: of the same rows.
    Attributes:
        any_own: whether a row may have its own projection; if none may, do not use the hooks.
    """

    def __init__(self, block: Block, keep: Tensor, outputs: SubmodelOutputs) -> None:
        self._block, self._keep, self._outputs = block, keep, outputs
        labels = outputs.labels(block)
        kinds = keep if labels is None else torch.cat([keep.long(), labels[:, None]], dim=1)
        different, kind_of_row = kinds.unique(dim=0, return_inverse=True)
        groups = [(kind_of_row == kind).nonzero().flatten() for kind in range(len(different))]
        self._groups = [rows for rows in groups if outputs.has_own(block, keep[rows[0]])]
        is_plain = torch.ones(len(keep), dtype=torch.bool)
        for rows in self._groups:
            is_plain[rows] = False
        self._plain = is_plain.nonzero().flatten()
        self._inputs = torch.empty(0)

    @property
    def any_own(self) -> bool:
        """See the class."""
        return len(self._groups) > 0

    def before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A pre-hook: only rows without their own projection enter the module."""
        states = inputs[0]
        # OPT flattens rows and tokens
        self._inputs = states.reshape(len(self._keep), -1, states.shape[-1])
        plain = self._zeroed(self._plain)
        return (plain.flatten(0, 1) if states.dim() == 2 else plain, *inputs[1:])

    def after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A hook that must run before all others: adds the rows that did not enter."""
        rows, length, _ = self._inputs.shape
        found = output.new_empty(rows, length, output.shape[-1])
        found[self._plain] = output.view(len(self._plain), *found.shape[1:])
        for group in self._groups:
            found[group] = self._own(module, group, output.shape[-1])
        self._inputs = torch.empty(0)
        return found.flatten(0, 1) if output.dim() == 2 else found

    def _own(self, module: nn.Module, rows: Tensor, width: int) -> Tensor:
        """Rows of one sub-layer mask by their projection: [len(rows), T, D]."""
        keep = self._keep[rows[0]]
        projection = self._outputs.projection(self._block, keep, int(rows[0]))
        if projection is None:
            found: Tensor = module.forward(self._zeroed(rows))
            return found
        columns = keep.repeat_interleave(self._block.part_width).nonzero().flatten()
        checked(projection, self._block, len(columns), width)
        kept = take(self._inputs[rows].flatten(0, 1), columns, 1)
        bias = projection.bias
        bias = getattr(module, "bias", None) if bias is None else bias.to(kept)
        return F.linear(kept, projection.weight.to(kept), bias).view(len(rows), -1, width)

    def _zeroed(self, rows: Tensor) -> Tensor:
        """Inputs of some rows [n, T, columns], zero where they keep nothing: a copy."""
        columns = self._keep[rows].repeat_interleave(self._block.part_width, dim=1)
        inputs = self._inputs[rows]
        return inputs.masked_fill_(~columns[:, None].to(inputs.device), 0)
