"""Prior "obs": what each unit costs if the others make up for it, in the order of removal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import projection_weight
from bonsai_fast.models.layout import Group, Layout
from bonsai_fast.recovery.closed_form.output_grams import OutputGrams
from bonsai_fast.recovery.closed_form.surgeon_order import surgeon_order
from bonsai_fast.scoring import masked

# of the mean diagonal; for some ten thousand tokens, 0.1 to 1 differ little
RIDGE = 0.3


@dataclass(frozen=True, eq=False)
class SurgeonCosts:
    """Both float64 [P].

    Attributes:
        rank: place of each unit in the order of removal of its group, from 0.
        added: what its removal adds to the squared error of the residual stream, as a share of it.
    """

    rank: Tensor
    added: Tensor

    def places(self, group: Group) -> Tensor:
        """The units of a group in the order of removal: int64 [units], positions in the layout."""
        return self.rank[group.start : group.stop].argsort() + group.start

    def rising(self, group: Group) -> Tensor:
        """What they add in that order, never less than one before: float64 [units]."""
        return self.added[self.places(group)].cummax(dim=0).values


def surgeon_costs(
    model: PreTrainedModel,
    layout: Layout,
    grams: OutputGrams,
    advance: Callable[[int], None] = lambda _: None,
) -> SurgeonCosts:
    """Order and costs of all units; `advance` is called with 1 after every group."""
    rank, added = (torch.zeros(len(layout), dtype=torch.float64) for _ in range(2))
    for group in layout.groups:
        own = projection_weight(model, group.block.output)
        gram = grams.of(group.block).gram.to(own.device)
        order, costs = surgeon_order(
            gram, own, group.block.part_width, group.part_of_unit, ridge=RIDGE
        )
        rank[group.start + order] = torch.arange(len(group), dtype=torch.float64)
        added[group.start : group.stop] = costs / len(own)
        advance(1)
    return SurgeonCosts(rank, added)


def surgeon_prior(
    model: PreTrainedModel,
    layout: Layout,
    keep: Tensor,
    input_ids: Tensor,
    folder: Path,
    *,
    memory_budget: int | str | None = None,
) -> Tensor:
    """Costs of all units, rising in the order of removal: float64 [P].

    Args:
        model, layout: the parent.
        keep: bool [P]; the text runs through this sub-model. Values of removed units mean nothing.
        input_ids: int64 [B, T].
        folder: a new directory for Gram matrices, which is deleted.
        memory_budget: as in `Sweep`.
    """
    grams = OutputGrams(folder)
    try:
        with masked(model, layout, keep[None].to(model.device)):
            grams.collect(model, input_ids, memory_budget=memory_budget)
        costs = surgeon_costs(model, layout, grams)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    prior = torch.empty(len(layout), dtype=torch.float64)
    for group in layout.groups:
        prior[costs.places(group)] = in_strict_order(costs.rising(group)) + 1e-30
    return prior


def in_strict_order(rising: Tensor) -> Tensor:
    """Values that never fall -> nearly the same ones, none of them equal to the one before.

    Args:
        rising: float64 [units].
    """
    return rising * (1 + 1e-9 * torch.arange(len(rising)))
