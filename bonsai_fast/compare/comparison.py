"""Several methods under one protocol: same text, same budget, same evaluation, one table.

Each (method, sparsity) is a cell with a run directory of its own, which resumes like every run. Its
results are written to `cell.json` when they are known.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.compare.cell import Cell, read_cell
from bonsai_fast.compare.cell_tables import as_csv, as_svg
from bonsai_fast.compare.equal_tokens import KNOBS, within_tokens
from bonsai_fast.config import PruneConfig
from bonsai_fast.console import Reporter
from bonsai_fast.delivery.recover_step import FOLDER, recovery_of
from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.evaluation.perplexity import Perplexity, perplexity
from bonsai_fast.evaluation.tasks import evaluate_tasks
from bonsai_fast.files import write_atomically, write_json
from bonsai_fast.methods import METHODS, WEIGHT_METHODS, Search, Task, configure, resolve
from bonsai_fast.methods.allocation import Target
from bonsai_fast.methods.configure import all_options, common_options
from bonsai_fast.methods.units.unit_options import UnitOptions
from bonsai_fast.prune.result_checks import check_result
from bonsai_fast.prune.units import prepare, pruned_model
from bonsai_fast.runs.directory import open_run
from bonsai_fast.runs.identity import RECOVERED

# options that differ between cells
OWN = ("sparsity", "target", "method", "preset")
# options that all methods share; presets set the rest
SHARED = tuple(
    name
    for name in (*common_options(), *(item.name for item in fields(UnitOptions)))
    if name not in OWN
)


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
        self.base = config = self._task.config
        texts = (self._task.calibration, self._task.evaluation)
        self._recovery = recovery_of(config, model, tokenizer, *texts)
        if self._recovery is not None:
            self._recovery.check(model, output)
            self._task = replace(self._task, compensates="compensate" in self._recovery.tiers)
        read = config.values_read()
        self._recover = {name: read[name] for name in RECOVERED if name in read}
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
        check_result(self.model, self._task.layout, config.options, budget)
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
        directory = self.output / _folder_of(name, task)
        run = open_run(directory, task.config, task.layout, self.model, task.calibration.sha256)
        path = directory / "cell.json"
        cell = read_cell(path, self._task.evaluation, self._recover)
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
            recovered = self._recovered(smaller, directory)
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
                **recovered,
            )
            write_json(path, asdict(cell))
            shutil.rmtree(directory / FOLDER, ignore_errors=True)
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

    def _recovered(self, smaller: PreTrainedModel, directory: Path) -> dict[str, Any]:
        """Recover the model of a cell; the fields of `Cell` about that."""
        if self._recovery is None:
            return {}
        done = self._recovery.run(smaller, directory / FOLDER, self.reporter)
        return {
            "recovered": perplexity(smaller, self._task.evaluation).value,
            "recovery_tokens": sum(record.tokens for record in done.records),
            "recovery_seconds": math.fsum(record.seconds for record in done.records),
            "recovery": self._recover,
        }

    def _tasks(self, smaller: PreTrainedModel) -> dict[str, dict[str, float]]:
        if self.base.tasks is None:
            return {}
        return evaluate_tasks(smaller, self.tokenizer, self.base.task_names)


def _folder_of(name: str, task: Task[Any]) -> str:
    """Name of a cell's directory; a search that counts on compensation is another one."""
    folder = f"{name.replace(':', '-')}-{task.config.sparsity:g}"
    usual = task.method.plan(replace(task, compensates=False))
    return folder if task.method.plan(task) == usual else f"{folder}-compensated"


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


def _plain(value: Any) -> Any:
    """NaN and infinity as null, since JSON has neither."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
