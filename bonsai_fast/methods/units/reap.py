"""Method "reap": removes the experts that change the result least where the router chooses them.

An expert's saliency is the mean, over the tokens that are routed to it, of the router's weight
times the norm of what it gives. Every mixture loses the same share of its experts; attention, dense
MLPs and shared experts stay.

Source: Lasby et al., arXiv:2510.13999 (router-weighted expert activation pruning).
Differs: an expert that no token of the text chose has saliency zero, and is reported.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bonsai_fast.config.choices import PresetName
from bonsai_fast.config.presets import Preset
from bonsai_fast.methods.allocation import equal_shares
from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.one_shot import ONE_SHOT_PRESETS, cut
from bonsai_fast.methods.units.unit_options import SparingOptions
from bonsai_fast.models import ExpertsBlock
from bonsai_fast.models.layout import Layout


class Reap:
    """One pass over the text, then a selection among experts alone."""

    presets: Mapping[PresetName, Preset[SparingOptions]] = ONE_SHOT_PRESETS

    def plan(self, task: Task[SparingOptions]) -> Plan:
        """A pass over the text.

        Raises:
            ValueError: there are no experts, or too few to reach the target.
        """
        _check_room(task.layout, task.budget)
        return Plan(1, 0, task.calibration.input_ids.numel())

    def find(self, search: Search[SparingOptions]) -> torch.Tensor:
        """The units to keep, bool [P]."""
        layout = search.task.layout
        everything = torch.ones(len(layout), dtype=torch.bool)
        saliency = search.prior("reap", "parent", everything, search.task.calibration.input_ids)
        relevance = equal_shares(layout, saliency)
        for group in layout.groups:
            inside = slice(group.start, group.stop)
            if not isinstance(group.block, ExpertsBlock) or group.kind != "expert":
                relevance[inside] = torch.inf
                continue
            # the best ones stay, or nothing would be left of the mixture
            best = saliency[inside].topk(group.block.fewest).indices
            relevance[group.start + best] = torch.inf
        return cut(search, relevance, search.task.budget)


def _check_room(layout: Layout, budget: int) -> None:
    """Refuse a target that removing experts alone cannot reach."""
    groups = [group for group in layout.groups if group.kind == "expert"]
    if not groups:
        why = layout.refused.get("expert", f"{layout.decoder.model_type} has none of these units")
        raise ValueError(f"method reap removes experts: {why}")
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in groups:
        assert isinstance(group.block, ExpertsBlock)
        keep[group.start : group.stop - group.block.fewest] = False
    most = layout.num_removed_parameters(keep)
    if budget > most:
        raise ValueError(
            f"method reap removes experts alone: at most {most:,} parameters "
            f"({most / layout.num_decoder_parameters:.1%} of the decoder), "
            f"{budget:,} were requested"
        )
