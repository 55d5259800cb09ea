"""Several methods under one protocol: same text, same budget, same evaluation, one table.

Each (method, sparsity) is a cell with a run directory of its own, which resumes like every run. Its
results are written to `cell.json` when they are known.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.compare.equal_tokens import KNOBS, within_tokens
from bonsai_fast.config import PruneConfig
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.evaluation.perplexity import Perplexity, perplexity
from bonsai_fast.evaluation.tasks import evaluate_tasks
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.files import write_atomically, write_json
from bonsai_fast.methods import METHODS, WEIGHT_METHODS, Search, Task, configure, resolve
from bonsai_fast.methods.allocation import TOLERANCE, Target
from bonsai_fast.methods.configure import all_options, common_options
from bonsai_fast.methods.units.unit_options import UnitOptions
from bonsai_fast.prune.units import prepare, pruned_model
from bonsai_fast.report.chart import Panel, draw
from bonsai_fast.runs.directory import open_run

# options that differ between cells
OWN = ("sparsity", "target", "method", "preset")
# options that all methods share; presets set the rest
SHARED = tuple(
    name
    for name in (*common_options(), *(item.name for item in fields(UnitOptions)))
    if name not in OWN
)


@dataclass(frozen=True)
class Cell:
    """Results of one method at one sparsity.

    Attributes:
        method: its name, followed by preset and options if given.
        asked, sparsity: requested and removed fraction of the decoder's parameters.
        parameters: of the whole pruned model.
        perplexity: on the common evaluation text; inf where it overflows.
        standard_error: of the mean loss, in nats.
        submodels, tokens: work of the search, as planned.
        seconds: of the search; nan if it was interrupted.
        peak_bytes: memory of the search beside the weights; None where it cannot be measured.
        protocol: how the perplexity was measured.
        tasks: zero-shot results, if requested.
    """

    method: str
    asked: float
    sparsity: float
    parameters: int
    perplexity: float
    standard_error: float
    submodels: int
    tokens: int
    seconds: float
    peak_bytes: int | None
    protocol: dict[str, Any]
    tasks: dict[str, dict[str, float]]

    @property
    def within_tolerance(self) -> bool:
        """Whether the sparsity differs from the request by at most 0.5 % of it."""
        return abs(self.asked - self.sparsity) <= TOLERANCE * self.asked


class Comparison:
    """Cells of one comparison in one directory.

    Args:
        model, tokenizer: the parent.
        base: options that all methods share (`SHARED`); its method and target are not used.
        output: directory of the comparison.
        search_tokens: forward tokens for each search; None: what Bonsai's default plans.
        reporter: where progress is shown.
    Raises:
        ValueError: the request cannot be met.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base: PruneConfig,
        output: Path,
        *,
        search_tokens: int | None,
        reporter: Reporter,
    ) -> None:
        if search_tokens is not None and search_tokens < 1:
            raise ValueError(f"search_tokens: expected at least 1, got {search_tokens}")
        self.output, self.search_tokens, self.reporter = output, search_tokens, reporter
        self.model, self.tokenizer = model, tokenizer
        self._task = prepare(model, tokenizer, base)
        self.base = self._task.config
        self.cells: list[Cell] = []

    def task_of(self, name: str, sparsity: float) -> Task[Any]:
        """The task of a cell; `name` is METHOD[:PRESET][:OPTION=VALUE]..., as `variant` reads it.

        Raises:
            ValueError: unknown method, preset or option, one that zeroes weights, or an impossible
                sparsity.
        """
        shared = {name: value for name, value in self.base.values().items() if name in SHARED}
        values = variant(name)
        method = values["method"]
        if method in WEIGHT_METHODS:
            raise ValueError(
                f"methods: expected methods that remove units, {method} zeroes weights"
            )
        config = resolve(configure(**shared, **values, sparsity=sparsity))
        budget = Target(sparsity=sparsity).removal_budget(self._task.layout)
        task = replace(self._task, config=config, method=METHODS[method], budget=budget)
        tokens = self.search_tokens
        if tokens is None:
            usual = resolve(configure(**shared, sparsity=sparsity))
            tokens = METHODS["bonsai"].plan(replace(task, config=usual)).tokens
        if KNOBS.get(method) in values:
            return task  # the name says how many steps
        return within_tokens(task, tokens)

    def dense(self) -> Perplexity:
        """The parent's perplexity, measured once."""
        path = self.output / "dense.json"
        if path.is_file():
            found = Perplexity(**json.loads(path.read_text()))
            if found.sha256 == self._task.evaluation.sha256:
                return found
        with self.reporter.busy("measuring the parent"):
            found = perplexity(self.model, self._task.evaluation)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found))
        return found

    def run(self, name: str, task: Task[Any]) -> Cell:
        """Prune and measure, or read what a former start measured.

        Raises:
            ValueError: the cell's directory holds another run.
        """
        directory = self.output / f"{name.replace(':', '-')}-{task.config.sparsity:g}"
        run = open_run(directory, task.config, task.layout, self.model, task.calibration.sha256)
        path = directory / "cell.json"
        cell = _read(path, self._task.evaluation)
        if cell is None:
            self.reporter.note(f"{name} at sparsity {task.config.sparsity:g}")
            search = Search(task, run, self.reporter)
            started = time.perf_counter()
            with PeakMemory(self.model.device) as peak:
                keep = task.method.find(search)
            seconds = time.perf_counter() - started if run.start == "new" else math.nan
            run.save_mask("final", keep)
            smaller = pruned_model(search, keep)
            found = perplexity(smaller, self._task.evaluation)
            plan = task.method.plan(task)
            parameters, layout = smaller.num_parameters(), task.layout
            removed = layout.num_model_parameters - parameters
            cell = Cell(
                method=name,
                asked=float(task.config.sparsity or 0.0),
                sparsity=removed / layout.num_decoder_parameters,
                parameters=parameters,
                perplexity=found.value,
                standard_error=found.standard_error,
                submodels=plan.submodels,
                tokens=plan.tokens,
                seconds=seconds,
                peak_bytes=peak.bytes,
                protocol=found.protocol,
                tasks=self._tasks(smaller),
            )
            write_json(path, asdict(cell))
        self.cells.append(cell)
        return cell

    def write(self) -> None:
        """Write comparison.csv, .json and .svg of the cells so far."""
        dense = self.dense()
        state = {
            "dense": asdict(dense),
            "calibration_sha256": self._task.calibration.sha256,
            "cells": [asdict(cell) for cell in self.cells],
        }
        write_json(self.output / "comparison.json", _plain(state))
        write_atomically(self.output / "comparison.csv", as_csv(self.cells).encode())
        write_atomically(self.output / "comparison.svg", as_svg(self.cells, dense).encode())

    def _tasks(self, smaller: PreTrainedModel) -> dict[str, dict[str, float]]:
        if self.base.tasks is None:
            return {}
        return evaluate_tasks(smaller, self.tokenizer, self.base.task_names)


def variant(name: str) -> dict[str, Any]:
    """The options in a name of a comparison: METHOD[:PRESET][:OPTION=VALUE]...

    Options are those that methods do not share; their values are text.

    Raises:
        ValueError: an option is none of these.
    """
    method, *parts = name.split(":")
    values = {"method": method}
    if parts and "=" not in parts[0]:
        values["preset"] = parts.pop(0)
    taken = (*SHARED, "method", "preset", "sparsity", "target")
    for part in parts:
        option, _, text = part.partition("=")
        option = option.replace("-", "_")
        if option not in all_options() or option in taken:
            raise ValueError(f"methods: expected METHOD[:PRESET][:OPTION=VALUE], got {name!r}")
        values[option] = text
    return values


def _read(path: Path, evaluation: Sequences) -> Cell | None:
    """A finished cell on the same text, or None."""
    if not path.is_file():
        return None
    cell = Cell(**json.loads(path.read_text()))
    return cell if cell.protocol["sha256"] == evaluation.sha256 else None


def _plain(value: Any) -> Any:
    """NaN and infinity as null, since JSON has neither."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(cells: list[Cell]) -> str:
    """One line for each cell."""
    names = [field.name for field in fields(Cell) if field.name not in ("protocol", "tasks")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(cell, name) for name in names] for cell in cells)
    return text.getvalue()


def as_svg(cells: list[Cell], dense: Perplexity) -> str:
    """Perplexity against sparsity, and against forward tokens."""
    names = list(dict.fromkeys(cell.method for cell in cells))
    sparsity = {
        name: [(0.0, dense.value)] + [(c.sparsity, c.perplexity) for c in cells if c.method == name]
        for name in names
    }
    # methods that read no text are drawn at one token
    tokens = {
        name: [(float(max(1, c.tokens)), c.perplexity) for c in cells if c.method == name]
        for name in names
    }
    return draw(
        [
            Panel("perplexity and sparsity", "sparsity", "perplexity", sparsity, log_y=True),
            Panel(
                "perplexity and search", "forward tokens", "perplexity", tokens,
                log_x=True, log_y=True,
            ),
        ]
    )  # fmt: skip


def as_table(cells: list[Cell], dense: Perplexity) -> Table:
    """The comparison, best perplexity first."""
    table = Table(title=f"methods compared; the parent's perplexity is {dense.value:.2f}")
    for column in ("method", "sparsity", "perplexity", "change", "tokens", "seconds", "peak MiB"):
        justify: Any = "left" if column == "method" else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for cell in sorted(cells, key=lambda cell: (cell.asked, cell.perplexity)):
        table.add_row(
            cell.method,
            f"{cell.sparsity:.2%}" + ("" if cell.within_tolerance else "*"),
            f"{cell.perplexity:.2f}",
            f"x{cell.perplexity / dense.value:.2f}",
            f"{cell.tokens:,}",
            "" if math.isnan(cell.seconds) else f"{cell.seconds:.1f}",
            "" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:,.0f}",
        )
    table.caption = (
        f"{dense.dataset}, {dense.tokens:,} predicted tokens, window {dense.window}; "
        "peak memory is the search's beside the weights"
    )
    if not all(cell.within_tolerance for cell in cells):
        table.caption += (
            f"; * differs from the sparsity by more than {TOLERANCE:.1%}: "
            "whole units and rounded widths allow no closer match"
        )
    return table
