"""Naive truth of what zeroes single weights: selection in Python, OBS with an inverse a column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def keep_best_reference(
    scores: Tensor, group_of: Tensor, num_pruned: Callable[[int], int]
) -> Tensor:
    """Prune the lowest scores of every group, the last of equal ones first.

    Args:
        scores: [out, in].
        group_of: int64 [out, in], the group in which each weight competes.
        num_pruned: number of weights to zero in a group of a given size.
    Returns:
        bool [out, in], True = kept.
    """
    keep = torch.ones_like(scores, dtype=torch.bool)
    for group in group_of.unique().tolist():
        places = [tuple(place) for place in (group_of == group).nonzero().tolist()]
        ranked = sorted(enumerate(places), key=lambda x: (float(scores[x[1]]), -x[0]))
        for _, place in ranked[: num_pruned(len(places))]:
            keep[place] = False
    return keep


def prune_columns_reference(
    weight: Tensor,
    gram: Tensor,
    choose: Callable[[int, Tensor, Tensor], Tensor],
    *,
    step: int,
    damping: float = 0.01,
) -> Tensor:
    """What `obs.prune_columns` does, with the inverse of what is left of H at every column.

    Args:
        weight: [out, in].
        gram: [in, in], with no zero on its diagonal.
        choose, step: as there.
        damping: of the mean of the diagonal.
    Returns:
        float64 [out, in].
    """
    left = weight.double().clone()
    hessian = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram))
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(gram))]
    for j, inverse in enumerate(inverses):
        if j % step == 0:
            pivots = torch.stack([later[0, 0] for later in inverses[j : j + step]])
            now = left[:, j : j + step]
            keep = choose(j, now, now.square() / pivots)
        gone = left[:, j].masked_fill(keep[:, j % step], 0.0)
        left[:, j:] -= torch.outer(gone / inverse[0, 0], inverse[0])
        left[~keep[:, j % step], j] = 0.0
    return left
