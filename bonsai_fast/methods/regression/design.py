"""Scored sub-models as the columns of a regression, never formed all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bonsai_fast.methods.regression.estimate import varying_columns

COLUMNS_AT_ONCE = 4096
# a unit with a prior of zero may still matter: it deviates by this share of its group's mean
SMALLEST_DEVIATION = 0.01


@dataclass(frozen=True, eq=False)
class Design:
    """Column i is minus unit i's removals, centred over the rows; its coefficient is a relevance.

    Attributes:
        keep: bool [S, P].
        noise: float64 [S]; rows are divided by it.
        weight: float64 [P], the prior divided by its sum over the group.
        deviation: float64 [P], standard deviation of a coefficient from its prior mean, up to a
            common factor.
        groups: int64 [P], numbered from zero.
        units: int64 [C], the units that vary.
        mass: float64 [S, G], the columns of each group summed with their weights.
        kernel: float64 [S, S], the columns times their transpose, weighted by deviation^2.
    """

    keep: np.ndarray
    noise: np.ndarray
    weight: np.ndarray
    deviation: np.ndarray
    groups: np.ndarray
    units: np.ndarray
    mass: np.ndarray
    kernel: np.ndarray

    @classmethod
    def of(
        cls,
        keep: np.ndarray,
        prior: np.ndarray | None,
        groups: np.ndarray | None,
        noise: np.ndarray,
    ) -> Design:
        """Normalise the prior, by default equal in a group, and read the columns once."""
        num_rows, num_units = keep.shape
        number = (
            np.zeros(num_units, np.int64)
            if groups is None
            else np.unique(groups, return_inverse=True)[1]
        )
        size = np.bincount(number)
        weight = np.ones(num_units) if prior is None else prior
        total = np.bincount(number, weights=weight)
        weight = np.where(total[number] > 0, weight, 1.0) / np.where(total > 0, total, size)[number]
        deviation = (
            weight
            if prior is None and groups is not None
            else np.maximum(weight, SMALLEST_DEVIATION / size[number])
        )
        empty = np.zeros((num_rows, len(size))), np.zeros((num_rows, num_rows))
        design = cls(keep, noise, weight, deviation, number, varying_columns(keep), *empty)
        for units, columns in design.chunks():
            share = np.zeros((len(units), len(size)))
            share[np.arange(len(units)), number[units]] = weight[units]
            np.add(design.mass, columns @ share, out=design.mass)
            columns *= deviation[units]
            np.add(design.kernel, columns @ columns.T, out=design.kernel)
        return design

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The units that vary and their columns, float64 [S, c], some at a time."""
        for start in range(0, len(self.units), COLUMNS_AT_ONCE):
            units = self.units[start : start + COLUMNS_AT_ONCE]
            columns = self.keep[:, units].astype(np.float64)
            columns -= columns.mean(axis=0)
            columns /= self.noise[:, None]
            yield units, columns

    @property
    def mean_column(self) -> np.ndarray:
        """The column [S] whose coefficient is the scale of the prior."""
        total: np.ndarray = self.mass.sum(axis=1)
        return total
