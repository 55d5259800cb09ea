"""What a search decides about: single units, blocks of channels, or whole decoder layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bonsai_fast.config.choices import GranularityOrShares
from bonsai_fast.methods.session import group_of_unit
from bonsai_fast.methods.units.layerwise import layer_of_unit
from bonsai_fast.methods.units.policy_gradient.bernoulli import Array
from bonsai_fast.models.layout import Layout

# channels of neighbouring prior that share a variable, and the fewest blocks of a group
BLOCKS = {"blocks": (32, 8), "shares": (128, 16)}


@dataclass(frozen=True, eq=False)
class Variables:
    """n variables over P units.

    Attributes:
        of_unit: int64 [P], variable of each unit.
        groups: int64 [n], variables that compare with each other: those of one (layer, kind), or
            all of them if they are layers.
        costs: float64 [n], parameters.
    """

    of_unit: torch.Tensor
    groups: np.ndarray
    costs: Array

    @classmethod
    def of(cls, layout: Layout, granularity: GranularityOrShares, prior: torch.Tensor) -> Variables:
        """Variables of a layout.

        Args:
            granularity: "units", "blocks", "shares" (larger blocks) or "layers".
            prior: float64 [P]; channels of neighbouring prior share a block.
        """
        if granularity == "layers":
            of_unit = layer_of_unit(layout)
        elif granularity in BLOCKS:
            of_unit = _blocks(layout, prior, *BLOCKS[granularity])
        else:
            of_unit = torch.arange(len(layout))
        count = int(of_unit.max()) + 1
        costs = torch.zeros(count, dtype=torch.float64)
        costs.index_add_(0, of_unit, layout.num_parameters_per_unit.double())
        groups = torch.zeros(count, dtype=torch.int64)
        if granularity != "layers":
            groups[of_unit] = group_of_unit(layout)
        return cls(of_unit, groups.numpy(), costs.numpy())

    def mean(self, of_units: torch.Tensor) -> Array:
        """Averages over the units of each variable: float64 [P] -> float64 [n]."""
        count = len(self.costs)
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, self.of_unit, of_units)
        return (sums / torch.bincount(self.of_unit, minlength=count)).numpy()


def _blocks(layout: Layout, prior: torch.Tensor, most: int, fewest_blocks: int) -> torch.Tensor:
    """Channels of a layer in blocks of neighbouring prior; every other unit alone: int64 [P].

    Args:
        most: channels of a block at most.
        fewest_blocks: that a group is cut into, if it has as many channels.
    """
    of_unit = torch.empty(len(layout), dtype=torch.int64)
    first = 0
    for group in layout.groups:
        size = 1
        if group.kind == "channel":
            size = max(1, min(most, len(group) // fewest_blocks))
        order = prior[group.start : group.stop].argsort(stable=True)
        of_unit[group.start + order] = first + torch.arange(len(group)) // size
        first = int(of_unit[group.start : group.stop].max()) + 1
    return of_unit
