"""Priors: importance of each unit from one forward pass of the parent (paper, appendix F)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import torch
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import projection_weight, weight
from bonsai_fast.config.choices import PriorName
from bonsai_fast.methods.importance.statistics import BlockStatistics, Statistics
from bonsai_fast.models import Block, ExpertsBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.ops.native import column_mean_abs


def unit_prior(
    name: PriorName, model: PreTrainedModel, layout: Layout, statistics: Statistics
) -> torch.Tensor:
    """Importance of every unit, from calibration statistics.

        wanda       mean over outputs o of |W[o, c]| * rms(a_c)    appendix F.2, equation 6
        activation  mean of |a_c|                                  appendix F.1, equations 4 and 5
        fluctuation var(a_c) * sum over outputs of W[o, c]^2       An et al., arXiv:2312.11983
        uniform     1
        reap        for experts: mean over the routed tokens of the router's weight times the norm
                    of the expert's output; for other units as wanda       arXiv:2510.13999

    for a column c of the output projection, averaged over the columns of a unit: one for a channel,
    `head_dim` for a head, those of all its query heads for a KV group, and I for an expert, whose
    input is weighted by the router (see `Statistics`).

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
    calibration text, as here; the published code computes it for each batch of one sequence and
    averages.
    """
    columns = column_importance(name, model, layout, statistics)
    prior = torch.empty(len(layout), dtype=torch.float64)
    for group in layout.groups:
        prior[group.start : group.stop] = group.mean_over_columns(columns[group.block.output])
        if name == "reap" and group.kind == "expert":
            prior[group.start : group.stop] = statistics.experts[group.block.output].saliency
    return prior


def column_importance(
    name: PriorName, model: PreTrainedModel, layout: Layout, statistics: Statistics
) -> dict[str, torch.Tensor]:
    """The same for every input column of every output projection, before units average them.

    Returns:
        float64 [in_features] by `block.output`.
    Raises:
        ValueError: as `unit_prior`.
    """
    if name not in get_args(PriorName):
        raise ValueError(f"prior: expected one of {get_args(PriorName)}, got {name!r}")
    return {
        block.output: _column_importance(name, model, block, statistics.of(block))
        for block in layout.decoder.blocks()
    }


def _column_importance(
    name: PriorName, model: PreTrainedModel, block: Block, statistics: BlockStatistics
) -> torch.Tensor:
    if name == "uniform":
        return torch.ones_like(statistics.sum_abs)
    if name == "activation":
        importance = statistics.mean_abs
    elif name == "fluctuation":
        norms = [found.double().square().sum(dim=0).cpu() for found in _outputs(model, block)]
        importance = statistics.variance * torch.cat(norms)
    else:
        means = [column_mean_abs(found).cpu() for found in _outputs(model, block)]
        importance = torch.cat(means) * statistics.root_mean_square
    if not bool(importance.isfinite().all()):
        raise ValueError(
            f"{block.output}: its weights or inputs hold NaN or Inf; "
            f"the model is broken or overflows"
        )
    return importance


def _outputs(model: PreTrainedModel, block: Block) -> Iterator[torch.Tensor]:
    """The output projection, or those of all experts in order: [D, columns] each."""
    if not isinstance(block, ExpertsBlock):
        yield projection_weight(model, block.output)
        return
    for found in weight(model, block.output).detach():
        yield found.T if block.transposed else found
