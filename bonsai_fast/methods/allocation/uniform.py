"""The same heads and widths in all layers: what a stock model class can express."""

from __future__ import annotations

import numpy as np
import torch

from bonsai_fast.methods.allocation.attention_shapes import Shape, rectangles, removed_from_group
from bonsai_fast.methods.allocation.parameter_count import (
    attention_groups,
    channel_groups,
    drop_empty,
    expert_groups,
)
from bonsai_fast.methods.allocation.round_widths import round_up, width_ladder
from bonsai_fast.methods.allocation.select import check_relevance, check_within
from bonsai_fast.models import ExpertsBlock
from bonsai_fast.models.layout import Group, Layout


def make_uniform(
    layout: Layout,
    keep: torch.Tensor,
    relevance: torch.Tensor,
    *,
    budget: int | None = None,
    multiple: int = 1,
) -> torch.Tensor:
    """Give all layers the same number of KV heads, of query heads for each, and of channels.

    In a model with mixtures of experts, these keep the same number of experts, and dense MLPs stay
    as they are.

    Each layer keeps its own most relevant ones. Every shape of the attention is combined with the
    narrowest MLP that the budget allows. The combination nearest to `keep` is chosen: the fewest
    parameters moved between attention and MLP plus unused parameters of the budget; then the least
    relevance lost.

    Args:
        keep: bool [P]; what it removed from attention in all layers together is what is aimed at.
        relevance: float [P], of removed units too; +inf: the unit stays.
        budget: parameters that may be removed in all; None: as many as `keep` removes.
        multiple: the width becomes a multiple of this, or stays whole.
    Returns:
        bool [P].
    Raises:
        ValueError: a shape is wrong, layers differ from the start, `keep` removes more than the
            budget, or the units that must stay admit no such form within it.
    """
    score = check_relevance(layout, relevance)
    removed = layout.num_removed_parameters(keep)
    budget = removed if budget is None else budget
    check_within(removed, budget)
    attention, experts = attention_groups(layout), expert_groups(layout)
    mlp = experts or channel_groups(layout)
    _check_alike(layout, attention, mlp)
    multiple = 1 if experts else multiple

    # removed sub-layers are restored: a stock class has all of them
    left = drop_empty(layout, keep)
    planned = sum(
        removed_from_group(layout, group, left[group.start : group.stop]) for group in attention
    )
    ladders = [width_ladder(group, keep.numpy(), score) for group in mlp]
    full, cost = len(mlp[0]), mlp[0].num_parameters
    fewest = max(g.block.fewest if isinstance(g.block, ExpertsBlock) else 1 for g in mlp)
    narrowest = max(fewest, *(int(np.isinf(score[ladder]).sum()) for ladder in ladders))
    best: tuple[tuple[float, float], list[Shape], int] | None = None
    for shapes in _common(layout, attention, score):
        gone = sum(shape.removed for shape in shapes)
        width = round_up(
            max(full - max(budget - gone, 0) // (len(mlp) * cost), narrowest), multiple, full
        )
        rest = budget - gone - (full - width) * len(mlp) * cost
        if rest < 0:
            continue
        lost = sum(shape.lost for shape in shapes) + sum(
            score[ladder[: full - width]].sum() for ladder in ladders
        )
        if best is None or (abs(gone - planned) + rest, lost) < best[0]:
            best = ((abs(gone - planned) + rest, float(lost)), shapes, width)
    if best is None:
        raise ValueError(f"no uniform form within the budget of {budget} parameters")

    result = torch.ones_like(keep)
    for group, shape in zip(attention, best[1], strict=True):
        result[group.start : group.stop] = shape.keep
    for ladder in ladders:
        result[torch.from_numpy(ladder[: full - best[2]])] = False
    return result


def _check_alike(layout: Layout, attention: list[Group], mlp: list[Group]) -> None:
    layers = layout.decoder.num_layers
    forms = {tuple(group.part_of_unit.tolist()) for group in attention}
    widths = {len(group) for group in mlp}
    wanted = len(layout.decoder.experts) if expert_groups(layout) else layers
    # a model whose heads cannot be removed one by one has none of their groups
    if (
        len(attention) not in (0, layers)
        or len(mlp) != wanted
        or len(forms) > 1
        or len(widths) != 1
    ):
        raise ValueError(
            "uniform: the layers of this model differ already; they cannot become alike"
        )


def _common(layout: Layout, attention: list[Group], score: np.ndarray) -> list[list[Shape]]:
    """For each form that every layer can take, its shape in every layer."""
    by_layer = [
        {shape.form: shape for shape in rectangles(layout, group, score)} for group in attention
    ]
    if not by_layer:
        return [[]]
    return [
        [shapes[form] for shapes in by_layer]
        for form in by_layer[0]
        if all(form in shapes for shapes in by_layer)
    ]
