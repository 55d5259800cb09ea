"""Work, memory and time of a run before it starts."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bonsai_fast.layerwise import Sweep
from bonsai_fast.methods import Plan, Task
from bonsai_fast.methods.weights.layer_by_layer import WeightTask, prune_layer

# sub-models of the batch that is timed
TIMED_SUBMODELS = 16


@dataclass(frozen=True)
class WeightPlan:
    """Work of a run that zeroes weights.

    Attributes:
        layers: number of decoder layers.
        weights, zeros: number of weights in their linear layers, and of zeros among them at the
            end, at least.
        tokens: forward tokens of calibration.
        layer_bytes: size of the largest layer, which is on the device while it is pruned.
        statistics_bytes: size of what is recorded about its inputs, at most, and of what is
            computed from that.
        seconds: estimated from one batch through the first layer, without evaluation.
    """

    layers: int
    weights: int
    zeros: int
    tokens: int
    layer_bytes: int
    statistics_bytes: int
    seconds: float


def weight_plan(task: WeightTask) -> WeightPlan:
    """Count, and time the first layer on one batch; nothing is written."""
    needs = task.method.needs(task.choice)
    linears = task.linears.values()
    widths = {linear.in_features for linear in linears}
    gram = 4 * (sum(width**2 for width in widths) + 3 * max(widths) ** 2)
    tokens = 0 if task.calibration is None else 2 * task.calibration.input_ids.numel()
    return WeightPlan(
        layers=len(task.layers),
        weights=sum(linear.weight.numel() for linear in linears),
        zeros=sum(_planned_zeros(task, *linear.weight.shape) for linear in linears),
        tokens=tokens,
        layer_bytes=max(
            sum(x.weight.numel() * x.weight.element_size() for x in layer.values())
            for layer in task.layers
        ),
        statistics_bytes={"nothing": 0, "moments": 8 * sum(widths), "gram": gram}[needs],
        seconds=_seconds_by_layer(task),
    )


def estimate_seconds(task: Task[Any], plan: Plan) -> float:
    """Time of the plan's forward passes on this machine, from one batch of sub-models."""
    tokens = task.calibration.input_ids[:1]
    rows = min(task.scorer.session(tokens).submodels_per_chunk, TIMED_SUBMODELS)
    # all different, or an engine would run them once
    different = torch.rand(rows, len(task.layout), generator=torch.Generator().manual_seed(0)) > 0.1
    task.scorer.score(different[:1], tokens)
    started = time.perf_counter()
    task.scorer.score(different, tokens)
    return (time.perf_counter() - started) / (rows * tokens.shape[1]) * plan.tokens


def _planned_zeros(task: WeightTask, outputs: int, inputs: int) -> int:
    """Zeros of one matrix, from how its weights are grouped."""
    pattern, within = task.choice.pattern, task.choice.within
    if pattern.group is not None:
        return outputs * inputs // pattern.group * pattern.num_pruned(pattern.group)
    if within in ("output", "input"):
        groups, size = (outputs, inputs) if within == "output" else (inputs, outputs)
        return groups * pattern.num_pruned(size)
    across, along = (inputs, outputs) if within == "input-128" else (outputs, inputs)
    step = across if within == "layer" else 128
    whole, rest = divmod(across, step)
    return whole * pattern.num_pruned(step * along) + pattern.num_pruned(rest * along)


def _seconds_by_layer(task: WeightTask) -> float:
    started = time.perf_counter()
    if task.calibration is None:
        prune_layer(task, 0, None)
        return (time.perf_counter() - started) * len(task.layers)
    with tempfile.TemporaryDirectory() as folder:
        everything = _sweep(task, len(task.calibration.input_ids), Path(folder))
        batch = _sweep(task, everything.batches[0].stop, Path(folder))
    batch.read(0)
    started = time.perf_counter()
    batch.read(0)
    read = time.perf_counter() - started
    prune_layer(task, 0, batch)
    prune = time.perf_counter() - started - 2 * read
    passes = 2 * len(everything.batches)
    return (passes * read + max(0.0, prune)) * len(task.layers)


def _sweep(task: WeightTask, sequences: int, folder: Path) -> Sweep:
    assert task.calibration is not None
    return Sweep(
        task.model,
        task.calibration.input_ids[:sequences],
        memory_budget=task.config.memory_budget,
        folder=folder,
    )
