"""Tables that commands show: both models side by side, and the work of recovery."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from bonsai_fast.delivery.model_result import Row, RunResult
from bonsai_fast.recovery.recover_model import Recovery


def result_table(result: RunResult) -> Table:
    """Dense and pruned model side by side."""
    table = Table(title=result.title, caption=result.caption)
    for column in Row("", "dense", "pruned", "change"):
        table.add_column(column, justify="right" if column else "left")
    for row in result.rows:
        table.add_row(*row)
    return table


def add_recovery(
    table: Table, recovery: Recovery | None, student: PreTrainedModel
) -> dict[str, Any]:
    """Add the work of recovery to the table of a plan; the same as values for JSON.

    Args:
        table: of two columns.
        recovery: the tiers; None: no recovery.
        student: the model, or its parent before it is pruned.
    """
    if recovery is None:
        return {"recovery": {}}
    plans = recovery.plans(student)
    for name, plan in plans.items():
        disk = f", {plan.disk_bytes / 1e9:.2f} GB on the disk" if plan.disk_bytes else ""
        table.add_row(f"recovery, {name}", f"{plan.tokens:,} tokens{disk}")
    recorded = recovery.recorded_bytes(student)
    table.add_row(
        "recovery, weights", f"up to {recorded / 1e9:.2f} GB on the disk until the model is saved"
    )
    values = {name: asdict(plan) for name, plan in plans.items()}
    return {"recovery": values, "recovery_weights_bytes": recorded}
