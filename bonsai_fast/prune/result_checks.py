"""Can the result of a search be built, saved and loaded? Asked before the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.export.expected_formats import expected_formats
from bonsai_fast.files import check_room
from bonsai_fast.methods import Task
from bonsai_fast.methods.allocation import auto_multiple, make_rectangular, make_uniform
from bonsai_fast.methods.units.unit_options import UnitOptions
from bonsai_fast.models import AttentionBlock, ExpertsBlock
from bonsai_fast.models.experts import CHANNEL_MULTIPLE
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery.kept import kept_by
from bonsai_fast.surgery.remove_units import check_removable
from bonsai_fast.surgery.skeleton import build_structure


def check_not_empty(model: PreTrainedModel, layout: Layout) -> None:
    """Refuse a model that has no unit to remove.

    Raises:
        ValueError: it says why there is none.
    """
    if len(layout) == 0:
        reasons = "; ".join(f"{kind}: {reason}" for kind, reason in layout.refused.items())
        raise ValueError(f"{type(model).__name__} has no unit that can be removed: {reasons}")


def check_result(model: PreTrainedModel, layout: Layout, options: UnitOptions, budget: int) -> None:
    """Refuse a request whose result could not be delivered.

    Models of the shapes that a search may choose are built on the meta device, without weights.

    Args:
        model: the parent.
        layout: its units.
        options: the shapes that the result may have.
        budget: number of parameters to remove.
    Raises:
        ValueError: the model is spread over devices, its class cannot express such shapes, or its
            layers cannot become alike.
    """
    if stream_of(model) is None:
        check_removable(model, layout)
    for keep in _shapes(layout, options, budget):
        build_structure(model, layout.decoder, kept_by(model, layout, keep))


def result_formats(task: Task[Any]) -> dict[str, str]:
    """For each export format "" or why the pruned model cannot be written in it."""
    keep = _shapes(task.layout, task.options, task.budget)[0]
    if task.options.head_layout == "rectangular" and not task.options.uniform:
        keep = make_rectangular(task.layout, keep, torch.ones(len(keep), dtype=torch.float64))
    kept = kept_by(task.model, task.layout, keep)
    return expected_formats(build_structure(task.model, task.layout.decoder, kept))


def check_model_room(task: Task[Any], output: Path) -> None:
    """Raise OSError if the disk of a new run directory has no room for the pruned model."""
    size = (task.layout.num_model_parameters - task.budget) * task.model.dtype.itemsize
    check_room(output, size, "the pruned model")


def _shapes(layout: Layout, options: UnitOptions, budget: int) -> list[torch.Tensor]:
    """Masks bool [P] of the shapes that a search may choose."""
    everything = torch.ones(len(layout), dtype=torch.bool)
    if options.uniform:
        multiple = options.width_multiple
        relevance = torch.ones(len(layout), dtype=torch.float64)
        width = auto_multiple(layout) if multiple == "auto" else multiple
        return [make_uniform(layout, everything, relevance, budget=budget, multiple=width)]
    uneven, without = everything.clone(), everything.clone()
    for group in layout.groups:
        # one unit less, two less, ...: no two layers are alike
        kept = max(1, len(group) - 1 - group.layer)
        if isinstance(group.block, ExpertsBlock) and group.kind == "channel":
            kept = max(1, kept // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
        uneven[group.start + kept : group.stop] = False
        if isinstance(group.block, AttentionBlock) == (group.layer % 2 == 0):
            without[group.start : group.stop] = False
    return [uneven, without]
