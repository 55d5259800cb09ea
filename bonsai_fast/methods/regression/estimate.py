"""Input checks and the result of every estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

MIN_ROWS = 4


@dataclass(frozen=True, eq=False)
class Regression:
    """The relevance of every unit, estimated from scored sub-models.

        U(sub-model) = intercept - sum of the relevance of the units that it lacks

    Attributes:
        relevance: float64 [P], utility lost without the unit; higher = more important. +inf for a
            unit that every sub-model kept, if the estimator knows nothing about it.
        standard_error: float64 [P]; +inf where nothing is known.
        intercept: predicted utility of the parent, all units kept.
        kendall_tau: rank agreement with the utilities, each predicted from other rows
            (cross-validated).
        r2: share of the utilities' variance that those predictions explain; negative = worse than
            the mean.
        held_out: float64 [S], those predictions; nan for rows that were left out.
        hyperparameters: what the estimator chose, by name.
        num_rows: sub-models used.
        num_dropped: sub-models left out because their utility was NaN or infinite.
    """

    relevance: torch.Tensor
    standard_error: torch.Tensor
    intercept: float
    kendall_tau: float
    r2: float
    held_out: torch.Tensor
    hyperparameters: Mapping[str, float | int | str]
    num_rows: int
    num_dropped: int

    def predict(self, masks: torch.Tensor) -> torch.Tensor:
        """Predicted utilities, bool [S, P] -> float64 [S]; -inf if infinite relevance is lost."""
        removed, known = ~torch.as_tensor(masks).cpu(), torch.isfinite(self.relevance)
        # selected and summed in blocks: S x P in float64 would be eight times the masks
        lost = torch.zeros(len(removed), dtype=torch.float64)
        for start in range(0, removed.shape[1], 8192):
            part = slice(start, start + 8192)
            lost += removed[:, part].double() @ torch.where(known, self.relevance, 0.0)[part]
        lost[removed[:, ~known].any(dim=1)] = torch.inf
        return self.intercept - lost


def scored_rows(
    masks: torch.Tensor, utility: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check scored sub-models and drop the rows without a finite utility.

    Args:
        masks: bool [S, P].
        utility: float [S].
    Returns:
        masks bool [n, P] and utilities float64 [n] of the other rows, and which rows those are,
        bool [S].
    Raises:
        TypeError, ValueError: a dtype or shape is wrong, or fewer than four rows are left.
    """
    keep, value = (
        torch.as_tensor(masks).cpu().numpy(),
        torch.as_tensor(utility).detach().cpu().double().numpy(),
    )
    if keep.dtype != np.bool_:
        raise TypeError(f"masks: expected dtype bool (True = kept), got {keep.dtype}")
    if keep.ndim != 2 or value.shape != keep.shape[:1]:
        raise ValueError(
            f"expected masks [S, P] and utility [S], got {keep.shape} and {value.shape}"
        )
    usable = np.isfinite(value)
    if usable.sum() < MIN_ROWS:
        raise ValueError(
            f"too few scored sub-models: {int(usable.sum())} of {len(value)} have a finite "
            f"utility, at least {MIN_ROWS} are needed"
        )
    return (keep if usable.all() else keep[usable]), value[usable], usable


def varying_columns(masks: np.ndarray) -> np.ndarray:
    """Units that some sub-models keep and others lack, int64; only these can be estimated."""
    return np.flatnonzero(masks.any(axis=0) & ~masks.all(axis=0))
