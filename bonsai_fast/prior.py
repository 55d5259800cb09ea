"""Priors: what one forward pass of the parent says about each unit (paper, appendix F)."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.models import Block
from bonsai_fast.native import column_mean_abs
from bonsai_fast.statistics import BlockStatistics, Statistics
from bonsai_fast.units import Layout

PriorName = Literal["wanda", "activation", "uniform"]


def unit_prior(
    name: PriorName, model: PreTrainedModel, layout: Layout, statistics: Statistics
) -> torch.Tensor:
    """Importance of every unit, from calibration statistics.

        wanda       mean over outputs o of |W[o, c]| * rms(a_c)    appendix F.2, equation 6
        activation  mean of |a_c|                                  appendix F.1, equations 4 and 5
        uniform     1

    for a column c of the output projection, averaged over the columns of a unit: one for a channel,
    `head_dim` for a head, those of all its query heads for a KV group.

    Args:
        name: one of the above.
        model: the parent.
        layout: its units.
        statistics: of the same parent.
    Returns:
        float64 [P], not negative.
    Raises:
        ValueError: unknown name, or statistics that are not finite.

    Source: Dery et al., arXiv:2402.05406, appendix F. Their rms runs over all tokens of the
    calibration text, as here; the published code takes it batch by batch (one sequence each) and
    averages the batches' values.
    """
    if name not in get_args(PriorName):
        raise ValueError(f"prior: expected one of {get_args(PriorName)}, got {name!r}")
    prior = torch.empty(len(layout), dtype=torch.float64)
    columns: dict[str, torch.Tensor] = {}
    for group in layout.groups:
        block = group.block
        if block.output not in columns:
            columns[block.output] = _column_importance(name, model, block, statistics.of(block))
        per_part = columns[block.output].view(len(group.part_of_unit), -1).mean(dim=1)
        counts = torch.bincount(group.part_of_unit, minlength=len(group))
        totals = torch.zeros(len(group), dtype=torch.float64).index_add_(
            0, group.part_of_unit, per_part
        )
        prior[group.start : group.stop] = totals / counts
    return prior


def _column_importance(
    name: PriorName, model: PreTrainedModel, block: Block, statistics: BlockStatistics
) -> torch.Tensor:
    if name == "uniform":
        return torch.ones_like(statistics.sum_abs)
    if name == "activation":
        importance = statistics.mean_abs
    else:
        weight = cast(nn.Linear, model.get_submodule(block.output)).weight
        importance = column_mean_abs(weight.detach()).cpu() * statistics.root_mean_square
    if not bool(importance.isfinite().all()):
        raise ValueError(
            f"{block.output}: its weights or inputs hold NaN or Inf; "
            f"the model is broken or overflows"
        )
    return importance
