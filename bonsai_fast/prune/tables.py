"""Tables of the prune command: the plan before a run."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.methods import Plan, Task
from bonsai_fast.methods.weights.layer_by_layer import WeightTask
from bonsai_fast.prune.forecast import WeightPlan


def plan_table(task: Task[Any], plan: Plan, seconds: float, formats: dict[str, str]) -> Table:
    """Work of a run that removes units.

    Args:
        task: the request.
        plan: of its method.
        seconds: estimated time for scoring.
        formats: of exports, as `result_formats` gives them.
    """
    layout = task.layout
    table = _plan_table(f"plan for {task.config.target_text}")
    table.add_row("units", ", ".join(f"{n:,} {kind}" for kind, n in layout.num_by_kind.items()))
    for kind, reason in layout.refused.items():
        table.add_row(f"not offered: {kind}", reason)
    why_hooks = task.scorer.why_hooks
    name = task.scorer.engine.name
    why = f", because the fused engine does not support it: {why_hooks}" if why_hooks else ""
    table.add_row("engine", f"{name}{why}")
    able = [name for name, why in formats.items() if not why]
    table.add_row("formats", ", ".join(["transformers", *able]))
    for name, why in formats.items():
        if why:
            table.add_row(f"no {name}", why)
    table.add_row(
        "to remove",
        f"{task.budget:,} of {layout.num_decoder_parameters:,} decoder parameters "
        f"({task.budget / layout.num_decoder_parameters:.2%}; "
        f"{task.budget / layout.num_model_parameters:.2%} of the whole model)",
    )
    table.add_row("calibration", f"{task.calibration.source}: {task.calibration.description}")
    table.add_row("rounds", str(plan.rounds))
    table.add_row("sub-models to score", f"{plan.submodels:,}")
    table.add_row("forward tokens", f"{plan.tokens:,}")
    table.add_row(
        "memory for scoring",
        f"{task.scorer.memory_budget / 2**20:,.0f} MiB beside the weights",
    )
    length = task.calibration.input_ids.shape[1]
    tokens = task.scorer.rows_per_batch(length) * length
    _add_stream(table, task.model, f", up to {tokens:,} tokens per pass")
    table.add_row("time for scoring", _minutes(seconds, "one batch"))
    return table


def weight_plan_table(task: WeightTask, plan: WeightPlan) -> Table:
    """Work of a run that zeroes weights."""
    choice, text = task.choice, task.calibration
    table = _plan_table(f"plan for {task.config.method}, {choice.pattern}")
    groups = f"{choice.pattern.group} neighbours" if choice.pattern.group else choice.within
    table.add_row("weights", f"{plan.weights:,} in {plan.layers} layers")
    table.add_row(
        "zeros", f"{plan.zeros:,} ({plan.zeros / plan.weights:.2%}), chosen within: {groups}"
    )
    table.add_row("kept weights", "updated to compensate" if choice.weight_update else "unchanged")
    table.add_row("calibration", f"{text.source}: {text.description}" if text else "none")
    table.add_row("forward tokens", f"{plan.tokens:,}")
    table.add_row(
        "memory",
        f"{plan.layer_bytes / 2**20:,.0f} MiB for a layer, "
        f"{plan.statistics_bytes / 2**20:,.0f} MiB for statistics, "
        f"{task.config.memory_budget or 'the default budget'} for hidden states",
    )
    _add_stream(table, task.model)
    table.add_row("time", _minutes(plan.seconds, "one layer"))
    return table


def _plan_table(title: str) -> Table:
    return Table(title=title, show_header=False)


def _add_stream(table: Table, model: PreTrainedModel, more: str = "") -> None:
    """Where the layers of a streamed model come from; nothing for a model in memory."""
    stream = stream_of(model)
    if stream is not None:
        source = "host memory" if stream.origin is None else "disk"
        table.add_row(
            "weights of the layers",
            f"{stream.num_bytes / 1e9:.2f} GB, streamed from {source}, "
            f"{stream.resident_bytes / 1e9:.2f} GB in memory at a time{more}",
        )


def _minutes(seconds: float, sample: str) -> str:
    return f"about {seconds / 60:.1f} minutes, estimated from {sample} timed on this machine"
