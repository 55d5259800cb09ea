"""What a person reads before and after weights are zeroed."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from bonsai_fast.methods import WEIGHT_METHODS
from bonsai_fast.methods.weights import Sweep
from bonsai_fast.methods.weights.layer_by_layer import WeightTask, prune_layer
from bonsai_fast.prune.tables import add_perplexity, new_comparison
from bonsai_fast.prune.weights import SparseResult


@dataclass(frozen=True)
class WeightPlan:
    """Work that a run is going to do.

    Attributes:
        layers: decoder layers.
        weights, zeros: in their linear layers, and how many of those will be zero at least.
        tokens: forward tokens of calibration.
        layer_bytes: of the largest layer, which is on the device while it is pruned.
        statistics_bytes: of what is recorded of its inputs, at most, and what is made of that.
        seconds: estimated from one batch through the first layer, evaluation not counted.
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
    needs = WEIGHT_METHODS[task.config.method].needs(task.choice)
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
        seconds=_estimate_seconds(task),
    )


def weight_plan_table(task: WeightTask, plan: WeightPlan) -> Table:
    """What a run would do, before it does it."""
    choice, text = task.choice, task.calibration
    table = Table(title=f"plan for {task.config.method}, {choice.pattern}", show_header=False)
    groups = f"{choice.pattern.group} neighbours" if choice.pattern.group else choice.within
    table.add_row("weights", f"{plan.weights:,} in {plan.layers} layers")
    table.add_row("zeros", f"{plan.zeros:,} ({plan.zeros / plan.weights:.2%}), within: {groups}")
    table.add_row("the others", "make up for them" if choice.weight_update else "stay as they are")
    table.add_row("calibration", f"{text.source}: {text.description}" if text else "none is read")
    table.add_row("forward tokens", f"{plan.tokens:,}")
    table.add_row(
        "memory",
        f"{plan.layer_bytes / 2**20:,.0f} MiB for a layer, "
        f"{plan.statistics_bytes / 2**20:,.0f} MiB for statistics, "
        f"{task.config.memory_budget or 'the default budget'} for text in flight",
    )
    table.add_row("time", f"about {plan.seconds / 60:.1f} minutes, from one layer timed here")
    return table


def sparse_table(result: SparseResult) -> Table:
    """The comparison that a person reads at the end."""
    table = new_comparison(f"dense and pruned: {result.method}, {result.pattern}")
    table.add_row(
        "zeros",
        f"{result.zeros_dense:,}",
        f"{result.zeros:,}",
        f"{result.sparsity:.2%} of {result.weights:,} weights, "
        f"{result.sparsity_total:.1%} of the model",
    )
    add_perplexity(table, result.dense_perplexity, result.pruned_perplexity, result.protocol)
    table.caption = (
        f"{table.caption}; "
        "zeros take the room and time of other numbers wherever an engine does not know better"
    )
    return table


def _planned_zeros(task: WeightTask, outputs: int, inputs: int) -> int:
    """Weights of one matrix that go, from how its groups are cut."""
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


def _estimate_seconds(task: WeightTask) -> float:
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
