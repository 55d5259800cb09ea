"""Method "layerwise-ppl": removes decoder layers, by the loss of the model without each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bonsai_fast.config.choices import PresetName, PriorName
from bonsai_fast.config.presets import Preset
from bonsai_fast.methods.allocation import equal_shares
from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.one_shot import cut
from bonsai_fast.methods.units.unit_options import (
    PUBLISHED_SHAPE,
    SparingOptions,
    UnitOptions,
    prior_option,
)
from bonsai_fast.models.layout import Layout

# calibration sequences that every layer's removal is judged on
SEQUENCES = 10


@dataclass(frozen=True, kw_only=True)
class LayerwiseOptions(SparingOptions):
    """Options of method "layerwise-ppl"."""

    prior: PriorName = prior_option()


class LayerwisePPL:
    """Scores the model without each layer once, and removes the layers that cost the least loss.

    Differs: what whole layers leave of the budget is removed from the next layer, heads and
    channels by Wanda's prior.

    Source: Kim et al., arXiv:2402.02834.
    """

    presets: Mapping[PresetName, Preset[LayerwiseOptions]] = {
        "default": Preset(LayerwiseOptions()),
        "paper": Preset(LayerwiseOptions(**PUBLISHED_SHAPE), 32, None),
    }

    def plan(self, task: Task[LayerwiseOptions]) -> Plan:
        """A sub-model for every layer, and a pass for the prior."""
        layers, input_ids = task.layout.decoder.num_layers, task.calibration.input_ids
        return Plan(1, layers, layers * input_ids[:SEQUENCES].numel() + input_ids.numel())

    def find(self, search: Search[LayerwiseOptions]) -> torch.Tensor:
        """The units to keep, bool [P]."""
        task, layout = search.task, search.task.layout
        everything = torch.ones(len(layout), dtype=torch.bool)
        rank = layer_losses(search).argsort(stable=True).argsort()
        prior = search.prior(task.options.prior, "parent", everything, task.calibration.input_ids)
        inside = equal_shares(layout, prior) / layout.num_parameters_per_unit  # in (0, 1]
        relevance = (rank[layer_of_unit(layout)] + inside) * layout.num_parameters_per_unit
        return cut(search, relevance, task.budget)


def layer_losses(search: Search[UnitOptions]) -> torch.Tensor:
    """Mean loss without each layer, float64 [layers]; inf where it overflows."""
    layout = search.task.layout
    without = layer_of_unit(layout)[None] != torch.arange(layout.decoder.num_layers)[:, None]
    losses = search.losses("layers", without, search.task.calibration.input_ids[:SEQUENCES])
    return losses.mean(dim=1, dtype=torch.float64).nan_to_num(nan=math.inf)


def layer_of_unit(layout: Layout) -> torch.Tensor:
    """Decoder layer of each unit, int64 [P]."""
    return torch.tensor([group.layer for group in layout.groups]).repeat_interleave(
        torch.tensor([len(group) for group in layout.groups])
    )
