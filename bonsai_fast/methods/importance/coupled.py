"""Importance from weights: all rows and columns of a unit count together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch

from bonsai_fast.models import AttentionBlock, Block, Cut
from bonsai_fast.models.layout import Group, Layout

Reduction = Literal["sum", "max"]


def coupled_importance(
    layout: Layout, measure: Callable[[Cut], torch.Tensor], *, reduction: Reduction
) -> torch.Tensor:
    """Importance of every unit from that of its coupled structures.

    A structure is a unit's part of one parameter: some rows of an input projection (or its bias),
    or some columns of an output projection. If several query heads are units and share a KV head,
    its structures count for each of them in equal parts.

    Args:
        layout: the units.
        measure: importance of each index along a cut's dimension, float [len(cut.owner)].
        reduction: "sum" over the structures of a unit, or the "max" of them.
    Returns:
        float64 [P].
    Raises:
        ValueError: unknown reduction, or importance that is not finite.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: expected one of {get_args(Reduction)}, got {reduction!r}")
    importance = torch.empty(len(layout), dtype=torch.float64)
    structures: dict[int, torch.Tensor] = {}
    for group in layout.groups:
        block = group.block
        if id(block) not in structures:
            structures[id(block)] = _by_part(block, measure)
        per_unit = _by_unit(group, structures[id(block)])
        found = per_unit.sum(dim=0) if reduction == "sum" else per_unit.amax(dim=0)
        if not bool(found.isfinite().all()):
            raise ValueError(f"{block.output}: weights, gradients or inputs hold NaN or Inf")
        importance[group.start : group.stop] = found
    return importance


def _by_part(block: Block, measure: Callable[[Cut], torch.Tensor]) -> torch.Tensor:
    """float64 [structures, query heads, channels or experts]."""
    rows = []
    for cut in block.cuts:
        parts = torch.zeros(block.num_parts, dtype=torch.float64)
        parts.index_add_(0, cut.owner, measure(cut).double().cpu())
        if isinstance(block, AttentionBlock):
            readers = torch.tensor(block.kv_of_head)
            shared = parts[block.num_heads :] / torch.bincount(readers)
            parts = parts[: block.num_heads] + shared[readers]
        rows.append(parts)
    return torch.stack(rows)


def _by_unit(group: Group, structures: torch.Tensor) -> torch.Tensor:
    """Sums over the parts of each unit: float64 [structures, units]."""
    found = torch.zeros(len(structures), len(group), dtype=torch.float64)
    return found.index_add_(1, group.part_of_unit, structures)
