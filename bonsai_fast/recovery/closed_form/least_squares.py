"""Weighted least squares for one linear layer, shrunk toward the weights that it has.

A layer y = W x + b should give t. With r = t - W x - b over tokens with weights w, find

    dW, db = argmin  sum w |dW x + db - r|^2 / sum w  +  ridge mean(diag A) |dW|^2

    A = sum w x x^T / sum w,  B = sum w x r^T / sum w,  dW = B^T (A + ridge mean(diag A) I)^-1

where x and r are centred if the layer has a bias. As the ridge grows, the layer keeps its weights.
If columns R of W were removed and t is what the whole layer gave, this is OBS's update
W_K += W_R A_RK (A_KK + ...)^-1 (Hassibi and Stork, 1993).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bonsai_fast.layerwise import UnusableInputsError
from bonsai_fast.recovery.closed_form.weighted_gram import BLOCK_TOKENS, WeightedGram

# rows of A that are float64 at a time where the whole of it is not needed so
BLOCK_ROWS = 1024


class WeightedSums:
    """Sums over tokens that determine the correction.

    Args:
        num_inputs, num_outputs: of the layer.
        device: where the sums are kept.
        with_bias: whether the layer has a bias.
    """

    def __init__(
        self, num_inputs: int, num_outputs: int, device: torch.device, *, with_bias: bool
    ) -> None:
        self.with_bias = with_bias
        self._inputs = WeightedGram(num_inputs, device, with_means=with_bias)
        self._cross = torch.zeros(num_inputs, num_outputs, device=device)
        self._residual = torch.zeros(num_outputs, dtype=torch.float64, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, residual: Tensor, weights: Tensor) -> None:
        """Add some tokens.

        Args:
            inputs: [N, in], what the layer reads.
            residual: [N, out], what its output lacks.
            weights: [N] or [N, 1], not negative.
        """
        for x, r, w in zip(
            inputs.split(BLOCK_TOKENS),
            residual.split(BLOCK_TOKENS),
            weights.float().flatten().split(BLOCK_TOKENS),
            strict=True,
        ):
            missing = r.float()
            self._cross.addmm_(self._inputs.add(x, w).T, missing)
            self._squares += (missing.square().sum(dim=1) * w).sum(dtype=torch.float64)
            if self.with_bias:
                self._residual += (missing * w[:, None]).sum(dim=0, dtype=torch.float64)

    @property
    def mean_weight(self) -> float:
        """Mean weight of the tokens."""
        return float(self._inputs.weight) / max(1, self._inputs.num_tokens)

    def normal_equations(self) -> NormalEquations:
        """Averages of the sums, centred if there is a bias; valid until tokens are added.

        Raises:
            UnusableInputsError: NaN or Inf.
        """
        if not (self._inputs.is_finite and bool(self._cross.isfinite().all())):
            raise UnusableInputsError("its inputs or outputs hold NaN or Inf")
        total = float(self._inputs.weight)
        return NormalEquations(
            self._inputs.gram(),
            self._cross,
            total,
            self._inputs.inputs / total,
            self._residual / total,
            float(self._squares) / total,
        )


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """What determines a correction.

    Large matrices are kept in float32, as they were summed, and made float64 only where they are
    used: a layer with 14,336 inputs has 1.6 GB of them in float64.

    Attributes:
        gram_sums, cross_sums: float32 [in, in] and [in, out], not yet averaged or centred.
        total: sum of the weights.
        mean_inputs, mean_residual: float64 [in] and [out]; 0 without a bias.
        mean_square: weighted mean of |r|^2.
    """

    gram_sums: Tensor
    cross_sums: Tensor
    total: float
    mean_inputs: Tensor
    mean_residual: Tensor
    mean_square: float

    def gram(self, rows: slice = slice(None)) -> Tensor:
        """A, or some rows of it: float64 [rows, in]."""
        found = self.gram_sums[rows].double().div_(self.total)
        return found.addr_(self.mean_inputs[rows], self.mean_inputs, alpha=-1)

    def cross(self, rows: slice = slice(None)) -> Tensor:
        """B, or some rows of it: float64 [rows, out]."""
        found = self.cross_sums[rows].double().div_(self.total)
        return found.addr_(self.mean_inputs[rows], self.mean_residual, alpha=-1)

    def solve(self, ridge: float) -> Correction | None:
        """The correction; None where A with this ridge is not positive definite."""
        damped = self.gram()
        scale = float(damped.diagonal().mean()) or 1.0
        damped.diagonal().add_(ridge * scale)
        # in place: the transposed matrix is laid out as LAPACK wants it
        lower = damped.mT
        failed = torch.empty((), dtype=torch.int32, device=damped.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if bool(failed):
            return None
        # torch.cholesky_solve would copy the factor
        half = torch.linalg.solve_triangular(lower, self.cross(), upper=False)
        change = torch.linalg.solve_triangular(lower.mT, half, upper=True).T
        return Correction(ridge, change, self.mean_residual - change @ self.mean_inputs)

    def error(self, correction: Correction | None) -> float:
        """Weighted mean of |dW x + db - r|^2; None: without a correction."""
        if correction is None:
            return self.mean_square
        change = correction.weight
        # what no bias of this text's own would leave
        offset = correction.bias + change @ self.mean_inputs - self.mean_residual
        found = self.mean_square - float(self.mean_residual.square().sum())
        for start in range(0, len(self.gram_sums), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            part = change[:, rows]
            found += float((part * (change @ self.gram(rows).T)).sum())
            found -= 2 * float((part * self.cross(rows).T).sum())
        return max(0.0, found + float(offset.square().sum()))


@dataclass(frozen=True, eq=False)
class Correction:
    """What is added to a layer.

    Attributes:
        ridge: it was found with.
        weight: float64 [out, in].
        bias: float64 [out]; 0 for a layer without a bias.
    """

    ridge: float
    weight: Tensor
    bias: Tensor


def best_correction(
    equations: NormalEquations, others: NormalEquations, ridges: tuple[float, ...]
) -> Correction | None:
    """The correction that leaves the smallest error on other text; None if none helps there."""
    best, smallest = None, others.error(None)
    for ridge in ridges:
        correction = equations.solve(ridge)
        if correction is not None and (error := others.error(correction)) < smallest:
            best, smallest = correction, error
    return best
