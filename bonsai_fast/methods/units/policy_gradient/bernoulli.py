"""Independent Bernoulli variables, kept or not, and steps down the expected loss of what they keep.

    minimise  E[L(m)],  m_i ~ Bernoulli(s_i),  subject to  sum_i c_i s_i <= K,  s in [0, 1]^n

The gradient needs losses alone: E[(L(m) - b) (m - s) / (s (1 - s))] for any b that does not depend
on m. A good b lowers its variance; see `BernoulliDescent`.

Source: policy-gradient pruning with Bernoulli masks: equations 3 to 8, theorem 1, algorithm 1,
appendices A.1, A.11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from bonsai_fast.config.choices import Baseline

Array = NDArray[np.float64]
Masks = NDArray[np.bool_]

# window T of the moving average
WINDOW = 5
# how exactly a shift meets the budget: one rounding of a number near 1
SHIFT_TOLERANCE = 1e-15


def sample(
    probabilities: Array, count: int, *, antithetic: bool, seed: int | Sequence[int]
) -> Masks:
    """Draw masks.

    Args:
        probabilities: s, [n].
        count: N of them.
        antithetic: rows 2i and 2i + 1 share their random numbers u, as u < s and 1 - u < s: what
            one keeps by luck the other tends to drop.
        seed: one or more non-negative integers.
    Returns:
        bool [N, n].
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    if not antithetic:
        return rng.random((count, len(probabilities))) < probabilities
    uniform = rng.random(((count + 1) // 2, len(probabilities)))
    masks = np.empty((2 * len(uniform), len(probabilities)), dtype=np.bool_)
    masks[0::2], masks[1::2] = uniform < probabilities, 1.0 - uniform < probabilities
    return masks[:count]


def gradient(masks: Masks, advantage: Array, probabilities: Array) -> Array:
    """Mean of (L(m) - b) grad log p(m) over the masks (equations 5 and 7).

    Args:
        masks: bool [N, n].
        advantage: L(m) - b of each, [N].
        probabilities: s, [n]. Variables at 0 or 1 cannot vary, and have none.
    Returns:
        [n].
    """
    variance = probabilities * (1.0 - probabilities)
    score = np.divide(
        masks - probabilities, variance, out=np.zeros(masks.shape), where=variance > 0
    )
    found: Array = advantage @ score / len(masks)
    return found


def leave_out(losses: Array, size: int) -> Array:
    """For each loss, the mean of those outside its block of `size` neighbours: [N] -> [N].

    It does not depend on the masks of the block, so that the gradient stays unbiased.
    """
    count = len(losses)
    if count <= size:
        raise ValueError(f"expected more than {size} sub-models a step, got {count}")
    block = np.arange(count) // size
    sums = np.bincount(block, weights=losses)[block]
    sizes = np.bincount(block)[block]
    found: Array = (losses.sum() - sums) / (count - sizes)
    return found


def largest_shift(size: Callable[[float], float], budget: float, low: float, high: float) -> float:
    """The largest shift in [low, high], to rounding, whose size is within the budget.

    Args:
        size: expected size at a shift; it does not decrease. If it is above the budget even at
            `low`, that is returned.
    """
    if size(low) >= budget:
        return low
    if size(high) <= budget:
        return high
    found = float(brentq(lambda shift: size(shift) - budget, low, high, xtol=SHIFT_TOLERANCE))
    step = SHIFT_TOLERANCE
    while size(found) > budget:  # the root may be a few roundings too far
        found, step = found - step, 2 * step
    return found


def project(values: Array, costs: Array, budget: float) -> Array:
    """The nearest point of the feasible set (theorem 1).

        argmin sum_i c_i (s_i - z_i)^2  subject to  sum_i c_i s_i <= K,  s in [0, 1]^n
            = min(1, max(0, z - v)),  v >= 0

    The paper counts every unit alike, c = 1. In the norm that counts a unit by its parameters the
    solution has the same form, and no kind of unit is pushed harder than another.

    Args:
        values: z, [n].
        costs: c, [n], positive.
        budget: K, not negative.
    Returns:
        [n], within the budget.
    """
    inside: Array = np.clip(values, 0.0, 1.0)
    if inside @ costs <= budget:
        return inside
    shift = largest_shift(
        lambda shift: float(np.clip(values + shift, 0.0, 1.0) @ costs),
        budget,
        -float(values.max()),
        0.0,
    )
    return np.clip(values + shift, 0.0, 1.0)


class BernoulliDescent:
    """Stochastic gradient descent on the probabilities.

    A pure function of the losses that it is given: the same ones lead to the same bits.

    Losses are compared with a baseline. "moving-average": equation 8, as published; it holds the
    step's own losses, which shrinks the gradient by 1 / (N_s T) parts. "leave-one-out": the mean of
    the step's other losses. "antithetic": masks in antithetic pairs, and the mean of the losses
    outside the pair; better only where the loss is mostly even around the probabilities, since for
    what is odd a pair says the same twice.

    Args:
        probabilities: s at the start, [n].
        costs: see `project`.
        learning_rate: eta of equation 7.
        baseline: one of the above.
        count: N_s, sub-models a step.
        seed: of all steps.
    Raises:
        ValueError: too few sub-models a step for the baseline.
    """

    def __init__(
        self,
        probabilities: Array,
        costs: Array,
        *,
        count: int,
        learning_rate: float,
        baseline: Baseline,
        seed: int,
    ) -> None:
        block = {"moving-average": 0, "leave-one-out": 1, "antithetic": 2}[baseline]
        if count <= block:
            raise ValueError(
                f"baseline {baseline}: expected more than {block} sub-models a step, got {count}"
            )
        self.probabilities, self.costs = probabilities, costs
        self.count, self.learning_rate, self.seed = count, learning_rate, seed
        self.step = 0
        self._block = block
        self._average = 0.0

    @property
    def levels(self) -> Array:
        """What variables are ranked by in the end, [n]: those of the highest level stay."""
        return self.probabilities

    def masks(self) -> Masks:
        """The sub-models whose losses the next step needs, bool [N_s, n]."""
        return sample(
            self.probabilities,
            self.count,
            antithetic=self._block == 2,
            seed=(self.seed, self.step),
        )

    def update(self, masks: Masks, losses: Array, budget: float) -> None:
        """One step: equation 8, equation 7, projection.

        Args:
            masks: what `masks` returned.
            losses: theirs, [N_s]; one that is not finite counts as the worst of the step.
            budget: K.
        """
        finite = np.isfinite(losses)
        self.step += 1
        if not finite.any():
            return
        losses = np.where(finite, losses, losses[finite].max())
        if self._block:
            advantage = losses - leave_out(losses, self._block)
        else:
            self._average += (float(losses.mean()) - self._average) / WINDOW
            advantage = losses - self._average
        self._move(masks, advantage, budget)

    def _move(self, masks: Masks, advantage: Array, budget: float) -> None:
        down = self.learning_rate * gradient(masks, advantage, self.probabilities)
        self.probabilities = project(self.probabilities - down, self.costs, budget)


def sigmoid_norm(metric: Array, groups: NDArray[np.int64]) -> Array:
    """Sigmoid of the metric, brought to mean 0 and variance 1 in each group (equation A10).

    Args:
        metric: [n].
        groups: int64 [n], which variables are compared.
    """
    return sigmoid(_normalised(metric, groups))


def score_const(keep: Masks, constant: float = 0.8) -> Array:
    """c for what a method would keep and 1 - c for what it would not (equation A11)."""
    return np.where(keep, constant, 1.0 - constant)


def sigmoid_budget(
    metric: Array, groups: NDArray[np.int64], costs: Array, budget: float, *, sharpness: float
) -> Array:
    """Sigmoid of the normalised metric, sharpened, and shifted until the budget is just met.

    Equation A10 starts at one half for every target; this starts at the budget.
    """
    steep = sharpness * _normalised(metric, groups)
    low, high = -50.0 - float(steep.max()), 50.0 - float(steep.min())
    shift = largest_shift(lambda shift: float(sigmoid(steep + shift) @ costs), budget, low, high)
    return sigmoid(steep + shift)


def _normalised(metric: Array, groups: NDArray[np.int64]) -> Array:
    sizes = np.bincount(groups)
    mean = np.bincount(groups, weights=metric) / sizes
    centred = metric - mean[groups]
    spread = np.sqrt(np.bincount(groups, weights=centred**2) / sizes)
    found: Array = centred / np.where(spread > 0, spread, 1.0)[groups]
    return found


def sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
