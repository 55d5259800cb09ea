"""Greedy choice of the units to remove."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch

from bonsai_fast.methods.allocation.parameter_count import RemovedCount
from bonsai_fast.models.layout import Layout

Order = Literal["relevance", "relevance_per_parameter"]


def select_units(
    layout: Layout,
    relevance: torch.Tensor,
    keep: torch.Tensor,
    *,
    budget: int,
    protect: torch.Tensor | None = None,
    order: Order = "relevance",
) -> torch.Tensor:
    """Remove the least relevant units, over all layers at once, until the budget is used up.

    Units are removed in rising order while they fit into the budget, which is never exceeded. The
    first unit that does not fit closes its group, so that no unit is removed before a less relevant
    one of its group; the other groups continue. Parameters are counted as by
    `Layout.num_removed_parameters`. Where single units are small, such as channels, less than one
    of them is left of the budget.

    Args:
        relevance: float [P]; +inf: the unit is kept.
        keep: bool [P], the current sub-model; units already removed stay so and count towards the
            budget.
        budget: parameters to remove in all, at most.
        protect: bool [P], units that are kept at any relevance.
        order: "relevance", as in the paper, or "relevance_per_parameter", which is better where
            units differ in size.
    Returns:
        bool [P].
    Raises:
        TypeError, ValueError: a shape or dtype is wrong, relevance is NaN or -inf, or `keep` has
            already removed more than the budget.
    Source: Dery et al., arXiv:2402.05406, equation 2 and algorithm 1, line 9.
    Differs: removes at most the budget, never more.
    """
    layout.check_mask(keep, dims=1)
    score = check_relevance(layout, relevance)
    if order not in get_args(Order):
        raise ValueError(f"order: expected one of {get_args(Order)}, got {order!r}")
    if order == "relevance_per_parameter":
        score = score / layout.num_parameters_per_unit.numpy()
    may_go = keep.numpy() & (score < np.inf)
    if protect is not None:
        layout.check_mask(protect, dims=1)
        may_go &= ~protect.numpy()
    count = RemovedCount(layout, keep)
    check_within(count.removed, budget)

    units = np.flatnonzero(may_go)
    gone, closed = [], set()
    for unit in units[np.argsort(score[units], kind="stable")].tolist():
        group = count.group_of_unit[unit]
        if group in closed:
            continue
        if count.removed + count.cost_of(unit) > budget:
            closed.add(group)
            if len(closed) == len(layout.groups):
                break
            continue
        count.remove(unit)
        gone.append(unit)
    result = keep.clone()
    result[gone] = False
    return result


def plan_mask(
    layout: Layout, order: torch.Tensor, counts: Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """Remove a given number of units from each group, the lowest by `order` first.

    Args:
        order: float [P]; only ranks inside a group matter; ties are decided by position.
        counts: [G] whole numbers, how many units of each group to remove.
    Returns:
        bool [P].
    Raises:
        ValueError: a shape is wrong, `order` is NaN or -inf, or a count is negative or larger than
            its group.
    """
    score = check_relevance(layout, order, name="order")
    if len(counts) != len(layout.groups):
        raise ValueError(
            f"counts: expected one for each of {len(layout.groups)} groups, got {len(counts)}"
        )
    keep = np.ones(len(layout), dtype=np.bool_)
    for group, count in zip(layout.groups, map(int, counts), strict=True):
        if not 0 <= count <= len(group):
            raise ValueError(
                f"counts: layer {group.layer} has {len(group)} {group.kind} units, got {count}"
            )
        keep[group.start + np.argsort(score[group.start : group.stop], kind="stable")[:count]] = (
            False
        )
    return torch.from_numpy(keep)


def check_relevance(
    layout: Layout, relevance: torch.Tensor, *, name: str = "relevance"
) -> np.ndarray:
    """float [P], finite or +inf -> float64 array.

    Raises:
        ValueError: a shape or value is wrong.
    """
    if relevance.shape != (len(layout),):
        raise ValueError(
            f"{name}: expected shape [P] with P = {len(layout)} units, got {tuple(relevance.shape)}"
        )
    score: np.ndarray = relevance.detach().cpu().double().numpy()
    if (bad := ~(score > -np.inf)).any():
        raise ValueError(f"{name}: {int(bad.sum())} of {len(score)} values are NaN or -inf")
    return score


def check_within(removed: int, budget: int) -> None:
    """Raise ValueError if more is removed than may be."""
    if removed > budget:
        raise ValueError(f"keep: {removed} parameters are removed already, the budget is {budget}")
