"""What a person reads before and after units are removed, and what all tables share."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.table import Table

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.methods import Plan, Task
from bonsai_fast.prune.units import PruneResult

# sub-models of the batch that a plan is timed by
TIMED_SUBMODELS = 16


def new_comparison(title: str) -> Table:
    """Rows of dense, pruned and the change between them."""
    table = Table(title=title)
    for column in ("", "dense", "pruned", "change"):
        table.add_column(column, justify="left" if not column else "right")
    return table


def add_perplexity(table: Table, dense: float, pruned: float, protocol: dict[str, Any]) -> None:
    """A row of both, and under the table how they were measured."""
    table.add_row("perplexity", f"{dense:.2f}", f"{pruned:.2f}", f"x{pruned / dense:.2f}")
    table.caption = (
        f"perplexity: {protocol['dataset']}, {protocol['tokens']:,} predicted tokens, "
        f"window {protocol['window']}, stride {protocol['stride']}"
    )


def result_table(result: PruneResult) -> Table:
    """The comparison that a person reads at the end."""
    table = new_comparison("dense and pruned")
    table.add_row(
        "parameters",
        f"{result.parameters_dense:,}",
        f"{result.parameters:,}",
        f"-{result.sparsity_total:.1%} (decoder -{result.sparsity:.2%})",
    )
    add_perplexity(table, result.dense_perplexity, result.pruned_perplexity, result.protocol)
    if result.latency:
        dense, pruned = result.latency["dense"], result.latency["pruned"]
        for name, label in (
            ("prefill_tokens_per_s", "prefill, tokens/s"),
            ("decode_tokens_per_s", "decode, tokens/s"),
        ):
            speedup = pruned[name.replace("tokens_per_s", "speedup")]
            table.add_row(label, f"{dense[name]:.1f}", f"{pruned[name]:.1f}", f"x{speedup:.2f}")
        table.caption = (
            f"{table.caption}; speeds: batch 1, medians, measured in turns, "
            f"{dense['decode_tokens']} tokens behind a prompt of {dense['prefill_tokens']}"
        )
    return table


def plan_table(task: Task, plan: Plan, seconds: float) -> Table:
    """What a run would do, before it does it."""
    layout = task.layout
    table = Table(title=f"plan for {task.config.target_text}", show_header=False)
    kinds = {
        kind: sum(len(group) for group in layout.groups if group.kind == kind)
        for kind in layout.kinds
    }
    budget = task.target.removal_budget(layout)
    table.add_row("units", ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()))
    table.add_row(
        "to remove",
        f"{budget:,} of {layout.num_decoder_parameters:,} decoder parameters "
        f"({budget / layout.num_decoder_parameters:.2%}; "
        f"{budget / layout.num_model_parameters:.2%} of the whole model)",
    )
    table.add_row("calibration", f"{task.calibration.source}: {task.calibration.description}")
    table.add_row("rounds", str(plan.rounds))
    table.add_row("sub-models scored", f"{plan.submodels:,}")
    table.add_row("forward tokens", f"{plan.tokens:,}")
    table.add_row(
        "memory for scoring", f"{task.scorer.memory_budget / 2**20:,.0f} MiB beside the weights"
    )
    stream = stream_of(task.model)
    if stream is not None:
        length = task.calibration.input_ids.shape[1]
        table.add_row(
            "weights of the layers",
            f"{stream.num_bytes / 1e9:.2f} GB, streamed from disk: "
            f"{stream.resident_bytes / 1e9:.2f} GB of them in memory at a time, "
            f"up to {task.scorer.rows_per_batch(length) * length:,} tokens a pass",
        )
    table.add_row(
        "time for scoring",
        f"about {seconds / 60:.1f} minutes, from one batch timed on this machine",
    )
    return table


def estimate_seconds(task: Task, plan: Plan) -> float:
    """Time that the plan's forward passes take on this machine, from one batch."""
    tokens = task.calibration.input_ids[:1]
    rows = min(task.scorer.session(tokens).submodels_per_chunk, TIMED_SUBMODELS)
    # all different, or an engine would run them once
    different = torch.rand(rows, len(task.layout), generator=torch.Generator().manual_seed(0)) > 0.1
    task.scorer.score(different[:1], tokens)
    started = time.perf_counter()
    task.scorer.score(different, tokens)
    return (time.perf_counter() - started) / (rows * tokens.shape[1]) * plan.tokens
