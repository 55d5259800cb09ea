"""Use up what rounding leaves of a budget, by exchanging heads for channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bonsai_fast.config.choices import HeadLayout
from bonsai_fast.methods.allocation.attention_shapes import (
    has_shared_heads,
    rectangles,
    removed_from_group,
)
from bonsai_fast.methods.allocation.parameter_count import attention_groups, channel_groups
from bonsai_fast.methods.allocation.round_widths import round_down, round_up, width_ladder
from bonsai_fast.methods.allocation.select import check_relevance
from bonsai_fast.models.layout import Group, Layout

FARTHEST_HEADS = 8  # units of one layer that an exchange may drop or restore
FARTHEST_WIDTHS = 16  # multiples of channels, in all layers together


@dataclass(frozen=True, eq=False)
class _Move:
    """Units to drop or to restore; restoring has negative numbers."""

    removed: int
    lost: float
    units: torch.Tensor  # int64, positions whose mask flips

    def __add__(self, other: _Move) -> _Move:
        units = torch.cat([self.units, other.units])
        return _Move(self.removed + other.removed, self.lost + other.lost, units)


_NOTHING = _Move(0, 0.0, torch.zeros(0, dtype=torch.int64))


def fill(
    layout: Layout,
    keep: torch.Tensor,
    relevance: torch.Tensor,
    *,
    budget: int,
    tolerance: int,
    multiple: int,
    head_layout: HeadLayout,
) -> torch.Tensor:
    """Remove more, until at most `tolerance` parameters of the budget are left or nothing fits.

    An exchange changes the attention of one layer, and removes or restores multiples of channels
    where that loses the least relevance. Of the exchanges that reach the tolerance, the one that
    loses the least relevance is made; otherwise the one that leaves the least of the budget. Widths
    stay multiples, heads keep their layout, no sub-layer is emptied and empty ones stay empty.

    Args:
        keep: bool [P], within the budget.
        relevance: float [P]; +inf: the unit stays.
    Returns:
        bool [P].
    """
    score, keep = check_relevance(layout, relevance), keep.clone()
    rest = budget - layout.num_removed_parameters(keep)
    while rest > tolerance:
        channels = [
            _NOTHING,
            *_channels(layout, keep, score, multiple, restore=True),
            *_channels(layout, keep, score, multiple, restore=False),
        ]
        best, best_rank = None, (rest, 0.0)
        for heads in [_NOTHING, *_cheapest(_heads(layout, keep, score, head_layout))]:
            for move in channels:
                left = rest - heads.removed - move.removed
                rank = max(left - tolerance, 0), heads.lost + move.lost
                if 0 <= left < rest and (best is None or rank < best_rank):
                    best, best_rank = heads + move, rank
        if best is None:
            break
        keep[best.units] ^= True
        rest -= best.removed
    return keep


def _cheapest(moves: Iterator[_Move]) -> list[_Move]:
    """The move of each size that loses least."""
    by_size: dict[int, _Move] = {}
    for move in sorted(moves, key=lambda move: move.lost):
        by_size.setdefault(move.removed, move)
    return list(by_size.values())


def _heads(
    layout: Layout, keep: torch.Tensor, score: np.ndarray, head_layout: HeadLayout
) -> Iterator[_Move]:
    """Every other form of the attention of every layer."""
    for group in attention_groups(layout):
        here = keep[group.start : group.stop]
        if not here.any():
            continue
        if head_layout == "rectangular" and has_shared_heads(group):
            forms = [shape.keep for shape in rectangles(layout, group, score)]
        else:
            forms = _more_or_fewer(group, keep, score)
        removed = removed_from_group(layout, group, here)
        values = torch.from_numpy(score[group.start : group.stop])
        for form in forms:
            lost = float(values[here & ~form].sum() - values[form & ~here].sum())
            change = removed_from_group(layout, group, form) - removed
            if change != 0 and abs(lost) < np.inf:
                yield _Move(change, lost, group.start + torch.nonzero(form != here).flatten())


def _more_or_fewer(group: Group, keep: torch.Tensor, score: np.ndarray) -> list[torch.Tensor]:
    """Some units fewer or more; the least relevant are removed first."""
    ladder = torch.from_numpy(width_ladder(group, keep.numpy(), score) - group.start)
    count = int(keep[group.start : group.stop].sum())
    forms = []
    for other in range(max(1, count - FARTHEST_HEADS), min(len(group), count + FARTHEST_HEADS) + 1):
        form = torch.zeros(len(group), dtype=torch.bool)
        form[ladder[len(group) - other :]] = True
        forms.append(form)
    return forms


def _channels(
    layout: Layout, keep: torch.Tensor, score: np.ndarray, multiple: int, *, restore: bool
) -> Iterator[_Move]:
    """1, 2, 3, ... multiples of channels, in the layers that lose the least relevance."""
    steps = []
    for group in channel_groups(layout):
        ladder = width_ladder(group, keep.numpy(), score)
        width = int(keep[group.start : group.stop].sum())
        for _ in range(FARTHEST_WIDTHS if width > 0 else 0):
            more, fewer = round_up(width + 1, multiple, len(group)), round_down(width, multiple)
            other = more if restore else fewer
            units = ladder[len(ladder) - max(width, other) : len(ladder) - min(width, other)]
            lost = float(score[units].sum()) * (-1 if restore else 1)
            if other in (0, width) or abs(lost) == np.inf:
                break
            removed = (width - other) * group.num_parameters
            steps.append(_Move(removed, lost, torch.from_numpy(units)))
            width = other
    # each further step of a layer loses more, so this order keeps a layer's steps in sequence
    steps.sort(key=lambda step: step.lost)
    total = _NOTHING
    for step in steps[:FARTHEST_WIDTHS]:
        total = total + step
        yield total
