"""Packed MLPs in two parts, without a copy or a zeroed channel for any mask.

The channels that all sub-models keep are one product for all rows. Kernels gather the candidates
that each row's mask keeps, and add both parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.operands.gather import Bank, gathers
from bonsai_fast.scoring.fused.operands.operands import MLPOperands
from bonsai_fast.scoring.fused.operands.packed import PackedMLP
from bonsai_fast.scoring.fused.parent import MLP, Attention, Projection
from bonsai_fast.scoring.fused.positions import Positions
from bonsai_fast.scoring.fused.sublayers import inner_of_normed, project_out


class Split:
    """A packed MLP with candidates, in two parts; see `split`.

    Args:
        spec: the MLP.
        positions: of the sequences.
        arithmetic: computes the fixed channels; gathered ones are always in full precision.
    """

    def __init__(self, spec: PackedMLP, positions: Positions, arithmetic: Arithmetic) -> None:
        self._spec, self._positions, self._arithmetic = spec, positions, arithmetic
        self._bank = Bank(spec, arithmetic)
        self._fixed: MLPOperands | None = None
        count = spec.candidates
        if count < spec.block.num_channels:
            # the candidates' part adds the bias
            unbiased = replace(spec, output=Projection(spec.output.weight, None))
            inputs = tuple(_rows_from(part, count) for part in spec.inputs.values())
            self._fixed = MLPOperands(spec.output.weight.t()[count:], unbiased, inputs)

    def shared(self, states: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute what does not depend on masks.

        Args:
            states: [R, T, D], the residual stream.
            out: [R, T, D], contiguous, overwritten.
        Returns:
            The norm's output, and what the fixed channels add, without the bias; None if there are
            none. Both are [R, T, D], in buffers.
        """
        normed = self._arithmetic.normalize(self._spec.norm, states)
        if self._fixed is None:
            return normed, None
        inputs = inner_of_normed(self._fixed, normed, self._positions, self._arithmetic)
        return normed, project_out(self._fixed, inputs, out, self._arithmetic)

    def change(
        self, normed: Tensor, fixed: Tensor | None, keep: Tensor, rows_of_mask: Sequence[int]
    ) -> Tensor:
        """What the MLP adds to rows grouped by mask: a new tensor [R, T, D].

        Args:
            normed, fixed: from `shared`.
            keep: bool [K, channels] on the CPU, no row all False.
            rows_of_mask: number of rows of each mask, in the rows' order.
        """
        candidates = self._bank.operands(keep[:, : self._spec.candidates], rows_of_mask)
        return candidates.project_out(candidates.inner(normed, self._positions), fixed)


def split(spec: Attention | MLP, positions: Positions, arithmetic: Arithmetic) -> Split | None:
    """A sub-layer in two parts; None if it has no candidates that the kernels can gather."""
    if not isinstance(spec, PackedMLP) or spec.candidates == 0 or not gathers(spec):
        return None
    return Split(spec, positions, arithmetic)


def _rows_from(projection: Projection, start: int) -> Projection:
    bias = projection.bias
    return Projection(projection.weight[start:], None if bias is None else bias[start:])
