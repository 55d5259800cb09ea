"""Optimal Brain Surgeon, column by column: the other weights are adjusted to make up for zeros.

Zeroing w_j costs least if the columns that are not final yet, U = {j, j+1, ...}, change by

    dw_U = -w_j / [H_U^-1]_jj * [H_U^-1]_{j, U}        H = X^T X / tokens + damping

Column j is then final for all rows, and the next H_U^-1 loses its first row and column. The upper
Cholesky factor of H^-1 holds all of them: its row j is [H_U^-1]_{j, U} / sqrt([H_U^-1]_jj).

Source: Frantar and Alistarh, arXiv:2301.00774 (SparseGPT); the cost is equation 3 of Sun et al.,
arXiv:2306.11695, appendix D. Written from the description there.
Differs: the weights of an input that is always zero cost nothing and are zeroed first, but are not
changed if they are kept; groups lose exactly their share, also with ties.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bonsai_fast.layerwise.linear_inputs import UnusableInputsError

# columns whose effect on all later columns is applied at once
BLOCK = 128
# fractions of the mean of H's diagonal; larger ones are tried if rounding makes H indefinite
DAMPING = (0.01, 0.1, 1.0)

# (first column, adjusted weights [out, n], costs [out, n]) -> bool [out, n], True = kept
Choose = Callable[[int, Tensor, Tensor], Tensor]


class InverseHessian:
    """The inverse of H, factorised.

    Args:
        gram: float32 [in, in], mean of x x^T over tokens.
    Raises:
        UnusableInputsError: it holds NaN or Inf, or cannot be inverted.

    Attributes:
        factor: float32 [in, in], the upper Cholesky factor of H^-1.
        pivots: float32 [in], its diagonal; infinite for an input that is always zero.
    """

    def __init__(self, gram: Tensor) -> None:
        self.factor, self._inverse_diagonal = _factor(gram)
        never = gram.diagonal() == 0
        self.pivots = self.factor.diagonal().masked_fill(never, torch.inf)
        self._inverse_diagonal.masked_fill_(never, torch.inf)

    def costs(self, weight: Tensor) -> Tensor:
        """w_ij^2 / [H^-1]_jj, what zeroing each weight alone would cost: float32 [out, in]."""
        return weight.float().square() / self._inverse_diagonal


def prune_columns(weight: Tensor, hessian: InverseHessian, choose: Choose, *, step: int) -> Tensor:
    """Prune all columns from left to right, in blocks.

    Args:
        weight: floating [out, in].
        hessian: of its inputs.
        choose: called once for every `step` columns, when all columns before them are final.
        step: number of columns; the last step may be shorter.
    Returns:
        float32 [out, in], exactly zero where `choose` is False.
    """
    columns = weight.shape[1]
    block = step * max(1, BLOCK // step)
    factor, pivots = hessian.factor, hessian.pivots
    # transposed, so that each column is contiguous
    left = weight.float().T.contiguous()
    for first in range(0, columns, block):
        last = min(first + block, columns)
        local, errors = left[first:last], torch.empty_like(left[first:last])
        for start in range(0, last - first, step):
            stop = min(start + step, last - first)
            now = local[start:stop].T
            cost = (now / pivots[first + start : first + stop]).square()
            keep = choose(first + start, now, cost).T
            for j in range(start, stop):
                gone = local[j].masked_fill(keep[j - start], 0.0)
                errors[j] = gone / pivots[first + j]
                local[j].masked_fill_(~keep[j - start], 0.0)
                local[j + 1 :].addr_(factor[first + j, first + j + 1 : last], errors[j], alpha=-1)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return left.T.contiguous()


def _factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the damped inverse, and the inverse's diagonal."""
    diagonal = gram.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise UnusableInputsError("expected finite inputs, got NaN or Inf in their Gram matrix")
    mean = float(diagonal.mean()) or 1.0
    for damping in DAMPING:
        damped = gram.clone()
        damped.diagonal().masked_fill_(diagonal == 0, mean).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed):
            continue
        inverse = torch.cholesky_inverse(lower, out=damped)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not bool(failed):
            return upper, inverse.diagonal().clone()
    raise UnusableInputsError(
        f"the Gram matrix of a layer's inputs cannot be inverted, even with {DAMPING[-1]:g} of its "
        "mean diagonal added; use more calibration text"
    )
