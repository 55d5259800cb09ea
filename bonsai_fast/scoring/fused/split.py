"""MLPs of a round of pruning in two parts, with no copy and no zeroed channel for any mask.

What all sub-models keep is one product for all their rows; of what varies, kernels gather for each
row what it keeps from where it lies, and add both to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.products import Multiply
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace
from bonsai_fast.scoring.fused.operands.gather import Bank, gathers
from bonsai_fast.scoring.fused.operands.operands import MLPOperands
from bonsai_fast.scoring.fused.operands.packed import PackedMLP
from bonsai_fast.scoring.fused.parent import MLP, Attention, Projection
from bonsai_fast.scoring.fused.positions import Positions
from bonsai_fast.scoring.fused.sublayers import inner_of_normed, normalize, project_out


class Split:
    """A packed MLP that has candidates, which the kernels can compute; see `split`.

    Args:
        spec: the MLP.
        positions: of the sequences.
        workspace: holds what is computed on the way.
        multiply: how products of the fixed channels are taken; gathered ones always in full
            precision.
        kernels: as in `passes.inner`.
    """

    def __init__(
        self,
        spec: PackedMLP,
        positions: Positions,
        workspace: Workspace,
        multiply: Multiply,
        *,
        kernels: bool,
    ) -> None:
        self._spec, self._positions, self._workspace = spec, positions, workspace
        self._multiply, self._kernels = multiply, kernels
        self._bank = Bank(spec, workspace)
        self._fixed: MLPOperands | None = None
        count = spec.candidates
        if count < spec.block.num_channels:
            # the candidates' part adds the bias
            unbiased = replace(spec, output=Projection(spec.output.weight, None))
            gate, up = (_behind(projection, count) for projection in (spec.gate, spec.up))
            rows = spec.output.weight.t()[count:]
            self._fixed = MLPOperands(unbiased, gate, up, rows)

    def shared(self, states: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """What does not depend on masks.

        Args:
            states: [R, T, D], the residual stream.
            out: [R, T, D], contiguous, overwritten.
        Returns:
            The norm's output, and what the fixed channels add without the bias, or None if there
            are none: both [R, T, D], in the workspace.
        """
        normed = normalize(self._spec.norm, states, self._workspace, kernels=self._kernels)
        if self._fixed is None:
            return normed, None
        inputs = inner_of_normed(
            *(self._fixed, normed, self._positions, self._workspace),
            multiply=self._multiply,
            kernels=self._kernels,
        )
        return normed, project_out(self._fixed, inputs, out, self._workspace, self._multiply)

    def change(
        self, normed: Tensor, fixed: Tensor | None, keep: Tensor, rows_of_mask: Sequence[int]
    ) -> Tensor:
        """What the MLP adds to rows grouped by mask: a new tensor [R, T, D].

        Args:
            normed, fixed: from `shared`.
            keep: bool [K, channels] on the CPU, no row all False.
            rows_of_mask: rows of each mask, one mask after another.
        """
        candidates = self._bank.operands(keep[:, : self._spec.candidates], rows_of_mask)
        return candidates.project_out(candidates.inner(normed, self._positions), fixed)


def split(
    spec: Attention | MLP,
    positions: Positions,
    workspace: Workspace,
    multiply: Multiply,
    *,
    kernels: bool,
) -> Split | None:
    """A sub-layer in two parts; None: it has no candidates, or they cannot be gathered."""
    if not isinstance(spec, PackedMLP) or spec.candidates == 0 or not gathers(spec):
        return None
    return Split(spec, positions, workspace, multiply, kernels=kernels)


def _behind(projection: Projection, count: int) -> Projection:
    bias = projection.bias
    return Projection(projection.weight[count:], None if bias is None else bias[count:])
