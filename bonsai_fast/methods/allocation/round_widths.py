"""MLP widths that engines run fast: multiples of 32 to 256."""

from __future__ import annotations

import heapq

import numpy as np
import torch

from bonsai_fast.methods.allocation.parameter_count import channel_groups, drop_empty
from bonsai_fast.methods.allocation.select import check_relevance, check_within
from bonsai_fast.models.experts import CHANNEL_MULTIPLE
from bonsai_fast.models.layout import Group, Layout

MULTIPLES = (256, 128, 64, 32)
LARGEST_SHIFT = 0.02  # of a layer's width, by rounding it

_Step = tuple[
    float, int, int, int, int
]  # price, number of the layer, width, next width, channel cost


def auto_multiple(layout: Layout) -> int:
    """The multiple to which `round_widths` rounds by default.

    The largest of 256, 128, 64 and 32 that divides every layer's width and moves none by more than
    2 %; 32 if there is none; 1, no rounding, if a layer has fewer than 128 channels, where steps of
    32 would matter more than relevance; 8 in mixtures of experts, which need that.
    """
    widths = [len(group) for group in channel_groups(layout)]
    if not widths or min(widths) < 4 * MULTIPLES[-1]:
        return CHANNEL_MULTIPLE if layout.has_mixtures else 1
    for multiple in MULTIPLES:
        if multiple / 2 <= LARGEST_SHIFT * min(widths) and all(
            width % multiple == 0 for width in widths
        ):
            return multiple
    return MULTIPLES[-1]


def round_widths(
    layout: Layout,
    keep: torch.Tensor,
    relevance: torch.Tensor,
    *,
    multiple: int,
    budget: int | None = None,
) -> torch.Tensor:
    """Make every layer's MLP width a multiple of `multiple`, over all layers at once.

    First, each layer is rounded up: its most relevant removed channels are restored. Then multiples
    of the least relevant channels are removed, those that lose the least first, while they fit into
    the budget. A layer whose width is not such a multiple from the start may also stay whole. Empty
    sub-layers stay so, and no other one is emptied. With `multiple` 1 only what is left of the
    budget is used up.

    Args:
        keep: bool [P]; heads stay as they are.
        relevance: float [P], of removed units too; +inf: the unit stays.
        multiple: positive.
        budget: parameters that may be removed in all; None: as many as `keep` removes.
    Returns:
        bool [P]; what is left of the budget is less than one multiple of channels, unless no layer
        can lose more.
    Raises:
        ValueError: a shape is wrong, `multiple` is not positive, or `keep` removes more than the
            budget.
    """
    if multiple < 1:
        raise ValueError(f"multiple: expected a positive whole number, got {multiple}")
    score = check_relevance(layout, relevance)
    keep = drop_empty(layout, keep)
    removed = layout.num_removed_parameters(keep)
    budget = removed if budget is None else budget
    check_within(removed, budget)

    kept = keep.numpy()
    ladders: dict[int, np.ndarray] = {}
    queue: list[_Step] = []
    for number, group in enumerate(channel_groups(layout)):
        width, cost = int(kept[group.start : group.stop].sum()), group.num_parameters
        if width == 0:
            continue
        ladders[number] = width_ladder(group, kept, score)
        rounded = round_up(width, multiple, len(group))
        kept[ladders[number][len(group) - rounded : len(group) - width]] = True
        removed -= (rounded - width) * cost
        _offer(queue, number, ladders[number], rounded, multiple, score, cost)
    while queue:
        _, number, width, fewer, cost = heapq.heappop(queue)
        if removed + (width - fewer) * cost > budget:
            continue
        ladder = ladders[number]
        kept[ladder[len(ladder) - width : len(ladder) - fewer]] = False
        removed += (width - fewer) * cost
        _offer(queue, number, ladder, fewer, multiple, score, cost)
    return keep


def round_up(width: int, multiple: int, full: int) -> int:
    """The next allowed width: a multiple, or the full one."""
    return min(-(-width // multiple) * multiple, full)


def round_down(width: int, multiple: int) -> int:
    """The next smaller multiple."""
    return (width - 1) // multiple * multiple


def width_ladder(group: Group, keep: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Positions of a layer's channels in the order to drop them: removed ones, then by relevance.

    Channels that the mask removes come first at any relevance, so that rounding stays near the
    mask.
    """
    inside = slice(group.start, group.stop)
    return group.start + np.lexsort((score[inside], keep[inside]))


def _offer(
    queue: list[_Step],
    number: int,
    ladder: np.ndarray,
    width: int,
    multiple: int,
    score: np.ndarray,
    cost: int,
) -> None:
    """Queue the step to the next smaller width, at the relevance it loses for each parameter."""
    fewer = round_down(width, multiple)
    lost = float(score[ladder[len(ladder) - width : len(ladder) - fewer]].sum())
    if fewer > 0 and lost < np.inf:
        heapq.heappush(queue, (lost / ((width - fewer) * cost), number, width, fewer, cost))
