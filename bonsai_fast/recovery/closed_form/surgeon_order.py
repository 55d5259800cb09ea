"""In which order units are removed if the others make up for each: Optimal Brain Surgeon.

With A the Gram matrix of a projection's inputs, H = (A + ridge mean(diag A) I)^-1 and V = W^T, the
removal of the columns S costs tr(V_S^T H_SS^-1 V_S). The cheapest unit is removed, and

    V -= H_:S H_SS^-1 V_S        H -= H_:S H_SS^-1 H_S:

give the others' new weights and inverse. Source: Hassibi and Stork, 1993; for structures,
Kurtic et al., arXiv:2302.04089 (ZipLM). Written from the formulas.
Differs: of units of one column, some are removed at a time. They are chosen one by one, each at its
exact cost, but among those that were cheapest before the first of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# units of one column that are removed at a time: one in so many, and at least so many
SHARE = 96
FEWEST = 16
# they are chosen among so many times as many
POOL = 4
# removed columns are dropped from the matrices when they are one in so many
DROPPED = 8


def surgeon_order(
    gram: Tensor, weight: Tensor, width: int, unit_of_part: Tensor, *, ridge: float
) -> tuple[Tensor, Tensor]:
    """The order of removal of a sub-layer's units, and what each adds to the cost.

    Args:
        gram: float [in, in], of the inputs of the output projection.
        weight: [out, in], of that projection.
        width: columns of each part (query head or channel).
        unit_of_part: int64 [parts], the unit of each part.
        ridge: as a multiple of the mean of the diagonal.
    Returns:
        int64 [units], the unit removed first, second, ...; float64 [units], by unit: what its
        removal added to the squared error of the projection's output.
    """
    unit = unit_of_part.repeat_interleave(width)
    num_units = int(unit_of_part.max()) + 1
    state = _State(_damped_inverse(gram, ridge), weight, unit)
    single = num_units == len(unit)
    batch = max(FEWEST, num_units // SHARE) if single else 1
    order: list[int] = []
    costs = torch.zeros(num_units, dtype=torch.float64)
    while len(order) < num_units:
        count = min(batch, num_units - len(order))
        chosen, added = state.cheapest_columns(count) if single else state.cheapest_unit()
        for number, cost in zip(chosen, added, strict=True):
            order.append(number)
            costs[number] = cost
        state.remove(chosen)
    return torch.tensor(order), costs


class _State:
    """H and V of the columns that are left; those of removed ones are 0 until they are dropped."""

    def __init__(self, inverse: Tensor, weight: Tensor, unit: Tensor) -> None:
        self._inverse = inverse
        self._values = weight.detach().to(inverse).T.contiguous()
        self._unit = unit
        self._gone = torch.zeros(len(unit), dtype=torch.bool)

    def cheapest_columns(self, count: int) -> tuple[list[int], list[float]]:
        """Choose units of one column each, one after another; numbers and what each adds."""
        alone = (self._values.square().sum(dim=1) / self._inverse.diagonal()).cpu()
        alone[self._gone] = torch.inf
        left = int((~self._gone).sum())
        pool = alone.argsort(stable=True)[: min(POOL * count, left)]
        there = pool.to(self._inverse.device)
        values = self._values[there]
        inverse, products = (
            x.double().cpu().numpy() for x in (self._inverse[there][:, there], values @ values.T)
        )
        places: list[int] = []
        added = []
        for _ in range(count):
            # what was chosen is 0 but for rounding
            cost = products.diagonal() / np.maximum(inverse.diagonal(), np.finfo(float).tiny)
            cost[places] = np.inf
            best = int(cost.argmin())
            places.append(best)
            added.append(float(cost[best]))
            # V_j -= h_j V_best, seen in the products of all V
            share = inverse[:, best] / inverse[best, best]
            row = products[best]
            products = (
                products
                - np.outer(share, row)
                - np.outer(row, share)
                + row[best] * np.outer(share, share)
            )
            inverse = inverse - np.outer(share, inverse[best])
        return self._unit[pool[places]].tolist(), added

    def cheapest_unit(self) -> tuple[list[int], list[float]]:
        """The unit of several columns that costs least, and its cost."""
        costs = {}
        for number in self._unit[~self._gone].unique().tolist():
            mine = (self._unit == number).to(self._inverse.device)
            corner = torch.linalg.cholesky(self._inverse[mine][:, mine])
            steps = torch.linalg.solve_triangular(corner, self._values[mine], upper=False)
            costs[number] = float(steps.square().sum(dtype=torch.float64))
        best = min(costs, key=lambda number: costs[number])
        return [best], [costs[best]]

    def remove(self, numbers: list[int]) -> None:
        """Remove units; the others make up for them."""
        gone = torch.isin(self._unit, torch.tensor(numbers))
        there = gone.to(self._inverse.device)
        block = self._inverse[:, there]
        lower = torch.linalg.cholesky(block[there])
        self._values.addmm_(block, torch.cholesky_solve(self._values[there], lower), alpha=-1)
        across = torch.linalg.solve_triangular(lower, block.T, upper=False)
        self._inverse.addmm_(across.T, across, alpha=-1)
        self._gone |= gone
        if int(self._gone.sum()) * DROPPED >= len(self._gone):
            left = ~self._gone
            there = left.to(self._inverse.device)
            self._inverse, self._values = self._inverse[there][:, there], self._values[there]
            self._unit, self._gone = self._unit[left], self._gone[left]


def _damped_inverse(gram: Tensor, ridge: float) -> Tensor:
    """float32 [in, in]; an input that is always zero has the largest values."""
    damped = gram.double()
    mean = float(damped.diagonal().mean()) or 1.0
    damped = damped + ridge * mean * torch.eye(len(gram), dtype=damped.dtype, device=gram.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).float()
