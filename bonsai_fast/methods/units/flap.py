"""Method "flap": removes units whose output varies little; a bias replaces their mean.

An input column of an output projection that hardly varies contributes a constant, which a bias can
replace. A column's score is its variance times the squared norm of its weights, standardised and
then compared over all layers. The mean output of the removed columns is added to the bias.

Source: An et al., arXiv:2312.11983: the metric of section 3.2 (weighted fluctuation), the global
structure search of 3.3, the bias compensation of 3.4. Written from the paper's description.
Differs: the budget counts parameters exactly instead of weighting a head by a constant.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import projection_weight
from bonsai_fast.hub import pruned_config
from bonsai_fast.methods.allocation import standardised
from bonsai_fast.methods.importance.prior import column_importance
from bonsai_fast.methods.importance.statistics import collect_statistics
from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.one_shot import ONE_SHOT_PRESETS, cut
from bonsai_fast.methods.units.unit_options import SparingOptions
from bonsai_fast.surgery.skeleton import has_bonsai_class


class Flap:
    """Statistics, a selection, and biases."""

    presets = ONE_SHOT_PRESETS

    def plan(self, task: Task[SparingOptions]) -> Plan:
        """A pass over the text."""
        return Plan(1, 0, task.calibration.input_ids.numel())

    def find(self, search: Search[SparingOptions]) -> torch.Tensor:
        """The units to keep, bool [P]."""
        # biases that compensation adds are removed elsewhere
        budget = search.task.budget + _num_new_biases(search.task)
        return cut(search, _measured(search)["relevance"], budget)

    def compensate(
        self, search: Search[SparingOptions], smaller: PreTrainedModel, keep: torch.Tensor
    ) -> None:
        """Add the mean output of the removed columns to the bias of every output projection."""
        measured, layout, parent = _measured(search), search.task.layout, search.task.model
        if pruned_config(smaller.config) is not None:
            cast(Any, smaller).add_output_biases()
        without: list[str] = []
        for block, kept in layout.keep_by_block(keep):
            gone = ~kept.repeat_interleave(block.part_width)
            if not bool(gone.any()):
                continue
            bias = cast(nn.Linear, smaller.get_submodule(block.output)).bias
            if bias is None:
                without.append(block.output)
                continue
            weight = projection_weight(parent, block.output)
            mean = measured[f"mean.{block.output}"][gone].to(weight.device)
            with torch.no_grad():
                lost = weight[:, gone.to(weight.device)].double() @ mean
                bias.copy_((bias.double() + lost).to(bias.dtype))
        if without:
            search.reporter.warn(
                f"no bias compensation: {type(smaller).__name__} has no bias in "
                f"{without[0]} and {len(without) - 1} others"
            )


def _measured(search: Search[SparingOptions]) -> dict[str, torch.Tensor]:
    """Relevance, and the mean of every input column of the output projections."""
    task = search.task
    layout, input_ids = task.layout, task.calibration.input_ids

    def measure() -> dict[str, torch.Tensor]:
        everything = torch.ones(len(layout), dtype=torch.bool)
        statistics = collect_statistics(task.scorer, everything, input_ids)
        columns = column_importance("fluctuation", task.model, layout, statistics)
        means = {
            f"mean.{block.output}": statistics.of(block).mean for block in layout.decoder.blocks()
        }
        return {"relevance": standardised(layout, columns), **means}

    return search.measured("parent", measure, input_ids.numel())


def _num_new_biases(task: Task[SparingOptions]) -> int:
    """Parameters that compensation adds, if the result's class takes them."""
    if task.options.uniform or not has_bonsai_class(task.model):
        return 0
    outputs = [
        cast(nn.Linear, task.model.get_submodule(block.output))
        for block in task.layout.decoder.blocks()
    ]
    return sum(output.out_features for output in outputs if output.bias is None)
