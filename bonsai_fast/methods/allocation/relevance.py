"""Which units compare with each other: from importance in a layer to relevance over all layers.

Relevance here is importance per parameter times parameters, so that it adds up over units of
different sizes; `select_units` reads it with order "relevance_per_parameter".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bonsai_fast.methods.allocation.select import check_relevance
from bonsai_fast.models.layout import Layout

# units of a spared layer cost this many times as much: they are removed last
SPARED = 1e6


def equal_shares(layout: Layout, importance: torch.Tensor) -> torch.Tensor:
    """Relevance by which all groups (layer, kind) lose the same share, least important units first.

    A unit's level is the share of its group that is removed when it is: rank / size, from rank 1.
    Selecting below a level t removes floor(t n) of every group of n.

    Args:
        importance: float [P]; only ranks inside a group matter; ties are decided by position.
    Returns:
        float64 [P], positive.
    Raises:
        ValueError: a shape is wrong, or a value is NaN or -inf.
    """
    check_relevance(layout, importance, name="importance")
    level = torch.empty(len(layout), dtype=torch.float64)
    for group in layout.groups:
        order = importance[group.start : group.stop].argsort(stable=True)
        ranks = torch.arange(1, len(group) + 1, dtype=torch.float64)
        level[group.start + order] = ranks / len(group)
    return level * layout.num_parameters_per_unit


def standardised(layout: Layout, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Relevance that compares units of all layers by how much they differ from their own layer.

    In each sub-layer the input columns of the output projection are brought to mean 0 and variance
    1; a unit's level is the mean over its columns, above the least of all.

    Args:
        columns: float64 [in_features] by `block.output`.
    Returns:
        float64 [P], not negative.
    Raises:
        ValueError: a value is not finite.
    Source: An et al., arXiv:2312.11983, section 3.3.
    """
    level = torch.empty(len(layout), dtype=torch.float64)
    for group in layout.groups:
        values = columns[group.block.output].double()
        spread = values.std()
        scores = (values - values.mean()) / (spread if spread > 0 else 1.0)
        level[group.start : group.stop] = group.mean_over_columns(scores)
    check_relevance(layout, level, name="importance")
    return (level - level.min()) * layout.num_parameters_per_unit


def spare_layers(layout: Layout, relevance: torch.Tensor, *, first: int, last: int) -> torch.Tensor:
    """Keep the first and the last layers whole while other layers can meet the target.

    Args:
        relevance: float64 [P], not negative.
        first, last: how many layers at either end.
    Returns:
        float64 [P].
    """
    result = relevance.clone()
    for group in layout.groups:
        if group.layer < first or group.layer >= layout.decoder.num_layers - last:
            inside = slice(group.start, group.stop)
            floor = relevance.max() / layout.num_parameters_per_unit.min()
            result[inside] = SPARED * (relevance[inside] + floor * group.num_parameters)
    return result
