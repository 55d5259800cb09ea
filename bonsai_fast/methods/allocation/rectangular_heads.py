"""Rectangular attention: the KV heads left in a layer serve equally many query heads."""

from __future__ import annotations

import heapq

import torch

from bonsai_fast.methods.allocation.attention_shapes import (
    Shape,
    has_shared_heads,
    rectangles,
    removed_from_group,
)
from bonsai_fast.methods.allocation.parameter_count import attention_groups, drop_empty
from bonsai_fast.methods.allocation.select import check_relevance, check_within
from bonsai_fast.models.layout import Layout


def make_rectangular(
    layout: Layout, keep: torch.Tensor, relevance: torch.Tensor, *, budget: int | None = None
) -> torch.Tensor:
    """Give all surviving KV heads of a layer equally many query heads, over all layers at once.

    A layer may keep any n of its KV heads with m query heads each; it keeps the most relevant ones.
    All layers start whole. Then layers step to smaller shapes, the step that loses the least
    relevance per parameter first, within what the budget leaves for attention. Heads may thus be
    restored as well as removed. The mask of channels stays. Removed sub-layers stay removed, and no
    other one is emptied.

    Nothing changes where no two query heads share a KV head, or where units are KV groups.

    Args:
        keep: bool [P].
        relevance: float [P], of removed units too; +inf: the unit stays.
        budget: parameters that may be removed in all; None: as many as `keep` removes.
    Returns:
        bool [P].
    Raises:
        ValueError: a shape is wrong, `keep` removes more than the budget, or heads that must stay
            admit no such form within it.
    """
    score = check_relevance(layout, relevance)
    keep = drop_empty(layout, keep)
    removed = layout.num_removed_parameters(keep)
    budget = removed if budget is None else budget
    check_within(removed, budget)

    groups = [
        group
        for group in attention_groups(layout)
        if has_shared_heads(group) and keep[group.start : group.stop].any()
    ]
    for group in groups:
        removed -= removed_from_group(layout, group, keep[group.start : group.stop])
    ladders = [_convex(rectangles(layout, group, score)) for group in groups]
    steps = [0] * len(groups)
    removed += sum(ladder[0].removed for ladder in ladders)
    if removed > budget:
        raise ValueError(
            f"no rectangular heads within the budget: {removed} parameters would be removed, "
            f"the budget is {budget}"
        )

    queue = [
        (_price(ladder, 0), number) for number, ladder in enumerate(ladders) if len(ladder) > 1
    ]
    heapq.heapify(queue)
    while queue:
        _, number = heapq.heappop(queue)
        ladder, step = ladders[number], steps[number]
        cost = ladder[step + 1].removed - ladder[step].removed
        if removed + cost > budget:
            continue  # this layer is done; smaller steps of other layers may still fit
        removed += cost
        steps[number] = step + 1
        if step + 2 < len(ladder):
            heapq.heappush(queue, (_price(ladder, step + 1), number))
    for group, ladder, step in zip(groups, ladders, steps, strict=True):
        keep[group.start : group.stop] = ladder[step].keep
    return keep


def _convex(shapes: list[Shape]) -> list[Shape]:
    """From the largest form down, those that no mixture of a larger and a smaller one beats."""
    hull: list[Shape] = []
    for shape in sorted(shapes, key=lambda shape: (shape.removed, shape.lost)):
        if hull and shape.removed == hull[-1].removed:
            continue
        while len(hull) > 1 and _price([hull[-1], shape], 0) <= _price(hull[-2:], 0):
            hull.pop()
        hull.append(shape)
    return hull


def _price(ladder: list[Shape], step: int) -> float:
    """Relevance lost for each parameter by going one step down."""
    here, there = ladder[step], ladder[step + 1]
    return (there.lost - here.lost) / (there.removed - here.removed)
