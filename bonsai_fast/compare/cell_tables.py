"""The cells of a comparison as a table, as CSV and as charts."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import fields
from typing import Any

from rich.table import Table

from bonsai_fast.compare.cell import Cell
from bonsai_fast.evaluation.perplexity import Perplexity
from bonsai_fast.methods.allocation import TOLERANCE
from bonsai_fast.report.chart import Panel, draw


def as_csv(cells: list[Cell]) -> str:
    """One line for each cell."""
    without = ("protocol", "tasks", "recovery")
    names = [item.name for item in fields(Cell) if item.name not in without]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(cell, name) for name in names] for cell in cells)
    return text.getvalue()


def as_svg(cells: list[Cell], dense: Perplexity) -> str:
    """Perplexity against sparsity, before and after recovery, and against forward tokens."""
    names = list(dict.fromkeys(cell.method for cell in cells))
    results = {"perplexity and sparsity": [cell.perplexity for cell in cells]}
    if _is_recovered(cells):
        results["after recovery"] = [cell.final for cell in cells]
    panels = []
    for title, values in results.items():
        series = {name: [(0.0, dense.value)] for name in names}
        for cell, value in zip(cells, values, strict=True):
            series[cell.method].append((cell.sparsity, value))
        panels.append(Panel(title, "sparsity", "perplexity", series, log_y=True))
    # methods that read no text are drawn at one token
    tokens = {
        name: [(float(max(1, c.tokens)), c.perplexity) for c in cells if c.method == name]
        for name in names
    }
    search = Panel(
        "perplexity and search", "forward tokens", "perplexity", tokens, log_x=True, log_y=True
    )
    return draw([*panels, search])


def as_table(cells: list[Cell], dense: Perplexity) -> Table:
    """The comparison, best final perplexity first."""
    table = Table(title=f"methods compared; the parent's perplexity is {dense.value:.2f}")
    after = ("recovered",) if _is_recovered(cells) else ()
    columns = ("method", "sparsity", "perplexity", *after, "change", "tokens", "seconds")
    for column in (*columns, "peak MiB"):
        justify: Any = "left" if column == "method" else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for cell in sorted(cells, key=lambda cell: (cell.asked, cell.final)):
        table.add_row(
            cell.method,
            f"{cell.sparsity:.2%}" + ("" if cell.within_tolerance else "*"),
            f"{cell.perplexity:.2f}",
            *(f"{cell.final:.2f}" for _ in after),
            f"x{cell.final / dense.value:.2f}",
            f"{cell.tokens:,}",
            "" if math.isnan(cell.seconds) else f"{cell.seconds:.1f}",
            "" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:,.0f}",
        )
    table.caption = (
        f"{dense.dataset}, {dense.tokens:,} predicted tokens, window {dense.window}; "
        "tokens, seconds and peak memory (beside the weights) are the search's"
    )
    if after:
        how = cells[0].recovery["recover"]
        tokens = ", ".join(f"{n:,}" for n in sorted({cell.recovery_tokens for cell in cells}))
        table.caption += f"; recovered: {how}, {tokens} tokens for each method"
    if not all(cell.within_tolerance for cell in cells):
        table.caption += (
            f"; * differs from the sparsity by more than {TOLERANCE:.1%}: "
            "whole units and rounded widths allow no closer match"
        )
    return table


def _is_recovered(cells: list[Cell]) -> bool:
    return any(cell.recovered is not None for cell in cells)
