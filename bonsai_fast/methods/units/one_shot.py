"""Methods that score the parent's units once and select: Wanda-sp, magnitude, random.

They compare units only inside a group (layer, kind), and remove the same fraction of all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from bonsai_fast.checkpoints.streaming import weight
from bonsai_fast.config.choices import PresetName
from bonsai_fast.config.presets import Preset
from bonsai_fast.methods.allocation import equal_shares, select_units, spare_layers
from bonsai_fast.methods.importance.coupled import coupled_importance
from bonsai_fast.methods.importance.prior import unit_prior
from bonsai_fast.methods.importance.statistics import collect_statistics, unreached_experts
from bonsai_fast.methods.session import Search, finished
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.unit_options import PUBLISHED_SHAPE, SparingOptions
from bonsai_fast.models import Cut

ONE_SHOT_PRESETS: Mapping[PresetName, Preset[SparingOptions]] = {
    "default": Preset(SparingOptions()),
    "paper": Preset(SparingOptions(**PUBLISHED_SHAPE), 32, None),
}


@dataclass(frozen=True)
class OneShot:
    """A method that computes the importance of every unit once.

    Attributes:
        importance: computes it, float64 [P].
        reads_text: whether it reads the calibration text.
        presets: see `Method`.
    """

    importance: Callable[[Search[Any]], torch.Tensor]
    reads_text: bool
    presets: Mapping[PresetName, Preset[SparingOptions]] = field(
        default_factory=lambda: ONE_SHOT_PRESETS
    )

    def plan(self, task: Task[SparingOptions]) -> Plan:
        """At most one pass over the text."""
        return Plan(1, 0, task.calibration.input_ids.numel() if self.reads_text else 0)

    def find(self, search: Search[SparingOptions]) -> torch.Tensor:
        """The units to keep, bool [P]."""
        task = search.task
        tokens = task.calibration.input_ids.numel() if self.reads_text else 0
        importance = search.importance("parent", lambda: self.importance(search), tokens)
        return cut(search, equal_shares(task.layout, importance), task.budget)


def cut(search: Search[SparingOptions], relevance: torch.Tensor, budget: int) -> torch.Tensor:
    """Select by relevance per parameter, then apply the last step.

    Args:
        relevance: float64 [P], not negative, on one scale for all units.
        budget: parameters to remove.
    Returns:
        bool [P].
    """
    task = search.task
    first, last = task.options.spare_first, task.options.spare_last
    if first or last:
        relevance = spare_layers(task.layout, relevance, first=first, last=last)
    everything = torch.ones(len(task.layout), dtype=torch.bool)
    keep = select_units(
        task.layout, relevance, everything, budget=budget, order="relevance_per_parameter"
    )
    keep = finished(search, keep, relevance, budget)
    search.run.save_mask("round-01", keep)
    return keep


def wanda(search: Search[SparingOptions]) -> torch.Tensor:
    """|W| times the norm of its input, averaged over the output projection.

    Source: An et al., arXiv:2312.11983, who made Sun et al., arXiv:2306.11695, structured.
    """
    task = search.task
    everything = torch.ones(len(task.layout), dtype=torch.bool)
    statistics = collect_statistics(task.scorer, everything, task.calibration.input_ids)
    for note in unreached_experts(task.layout, everything, statistics):
        search.reporter.warn(note)
    return unit_prior("wanda", task.model, task.layout, statistics)


def magnitude(search: Search[SparingOptions], *, power: int) -> torch.Tensor:
    """Sum of |w| ** power over all weights of a unit.

    Source: the baselines of Ma et al., arXiv:2305.11627.
    """
    task = search.task

    def of_cut(found: Cut) -> torch.Tensor:
        values = weight(task.model, found.parameter).detach()
        others = [dim for dim in range(values.dim()) if dim != found.dim]
        values = values.float().abs().pow(power)
        return values.sum(dim=others, dtype=torch.float64) if others else values

    return coupled_importance(task.layout, of_cut, reduction="sum")


def chance(search: Search[SparingOptions]) -> torch.Tensor:
    """Random importance."""
    rng = np.random.Generator(np.random.PCG64(search.task.config.seed))
    return torch.from_numpy(rng.random(len(search.task.layout)))


WANDA_SP = OneShot(wanda, reads_text=True)
MAGNITUDE_L1 = OneShot(partial(magnitude, power=1), reads_text=False)
MAGNITUDE_L2 = OneShot(partial(magnitude, power=2), reads_text=False)
RANDOM = OneShot(chance, reads_text=False)
