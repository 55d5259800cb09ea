"""Tables that commands show: both models side by side, and the work of recovery."""

from __future__ import annotations

from rich.table import Table

from bonsai_fast.config.choices import Tier
from bonsai_fast.delivery.model_result import Row, RunResult
from bonsai_fast.recovery import RecoveryPlan


def result_table(result: RunResult) -> Table:
    """Dense and pruned model side by side."""
    table = Table(title=result.title, caption=result.caption)
    for column in Row("", "dense", "pruned", "change"):
        table.add_column(column, justify="right" if column else "left")
    for row in result.rows:
        table.add_row(*row)
    return table


def add_recovery(table: Table, name: Tier, plan: RecoveryPlan) -> None:
    """Work of a recovery tier."""
    disk = f", {plan.disk_bytes / 1e9:.2f} GB on the disk" if plan.disk_bytes else ""
    table.add_row(f"recovery, {name}", f"{plan.tokens:,} tokens{disk}")
