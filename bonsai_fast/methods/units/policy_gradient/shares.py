"""Policy gradient with few unknowns: what share of each group is removed.

To learn a probability for every unit needs far more sub-models than units. The order of units
inside a group (layer, kind) is known well enough from one pass over text; unknown is how much of
each group can be removed. So the Bernoulli variables of a group share one parameter:

    s_i = sigmoid(k (r_i - t_g)),   r_i = rank of i in its group / size,   t_g = share removed

The gradient by t_g is that of all its variables together, dL/dt_g = -k sum_i (L - b) (m_i - s_i),
and its relative noise grows with the number of groups, not of units.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bonsai_fast.config.choices import Baseline
from bonsai_fast.methods.units.policy_gradient.bernoulli import (
    Array,
    BernoulliDescent,
    Masks,
    largest_shift,
    sigmoid,
)

# k: units within about 2 / k of their group's share are undecided
SHARPNESS = 20.0
# beyond these shares all units of a group are decided
LOWEST, HIGHEST = -4.0 / SHARPNESS, 1.0 + 4.0 / SHARPNESS


class ShareDescent(BernoulliDescent):
    """Stochastic gradient descent on removed shares; probabilities follow from them.

    A step is scaled so that shares change by `learning_rate`, root mean square over parameters, at
    the first of `steps` and by ever less towards the last.

    Args:
        ranks: r, [n], in (0, 1].
        groups: int64 [n], group of each variable, numbered from 0 without gaps.
        costs: parameters of each, [n].
        budget: K at the start.
        start: shares at the start, [groups]; a common shift is added to meet the budget.
        steps: number of steps.
        learning_rate, baseline, count, seed: as for `BernoulliDescent`.
    """

    def __init__(
        self,
        ranks: Array,
        groups: NDArray[np.int64],
        costs: Array,
        budget: float,
        *,
        start: Array,
        steps: int,
        count: int,
        learning_rate: float,
        baseline: Baseline,
        seed: int,
    ) -> None:
        self._ranks, self._groups, self._steps = ranks, groups, steps
        self._weights = np.bincount(groups, weights=costs) / costs.sum()
        self.costs = costs
        self.shares = self._within(start, budget)
        super().__init__(
            self._probabilities(self.shares),
            costs,
            count=count,
            learning_rate=learning_rate,
            baseline=baseline,
            seed=seed,
        )

    @property
    def levels(self) -> Array:
        """How far above its group's share each variable ranks, [n]."""
        found: Array = self._ranks - self.shares[self._groups]
        return found

    def _move(self, masks: Masks, advantage: Array, budget: float) -> None:
        found = share_gradient(masks, advantage, self.probabilities, self._groups)
        # the steepest way down at a given number of parameters that change sides
        steepest = found / self._weights
        steepest -= self._weights @ steepest
        size = float(np.sqrt(self._weights @ steepest**2))
        if size > 0:
            rate = self.learning_rate * (1.0 - (self.step - 1) / self._steps)
            self.shares = self._within(self.shares - rate / size * steepest, budget)
        self.probabilities = self._probabilities(self.shares)

    def _probabilities(self, shares: Array) -> Array:
        return sigmoid(SHARPNESS * (self._ranks - shares[self._groups]))

    def _within(self, shares: Array, budget: float) -> Array:
        """Shares moved by the same amount until the expected size just fits the budget."""

        def moved(less: float) -> Array:
            found: Array = np.clip(shares - less, LOWEST, HIGHEST)
            return found

        def size(less: float) -> float:
            return float(self._probabilities(moved(less)) @ self.costs)

        low, high = shares.min() - HIGHEST, shares.max() - LOWEST
        return moved(largest_shift(size, budget, low, high))


def ranks(metric: Array, groups: NDArray[np.int64]) -> Array:
    """Rank of each variable in its group, from the lowest metric on, over the group's size: [n]."""
    order = np.lexsort((metric, groups))
    sizes = np.bincount(groups)
    first = np.cumsum(sizes) - sizes
    inside = groups[order]
    found = np.empty_like(metric)
    found[order] = (np.arange(1, len(metric) + 1) - first[inside]) / sizes[inside]
    return found


def share_gradient(
    masks: Masks, advantage: Array, probabilities: Array, groups: NDArray[np.int64]
) -> Array:
    """Mean of (L(m) - b) d log p(m) / dt over the masks, for every group.

    Args:
        masks: bool [N, n].
        advantage: L(m) - b of each, [N].
        probabilities: s, [n].
        groups: int64 [n].
    Returns:
        [number of groups].
    """
    pull = -SHARPNESS * advantage @ (masks - probabilities) / len(masks)
    return np.bincount(groups, weights=pull).astype(np.float64)
