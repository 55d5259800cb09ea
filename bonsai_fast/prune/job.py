"""A request to remove units or to zero weights: check it, show its plan, run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.config import PruneConfig
from bonsai_fast.console import Reporter
from bonsai_fast.delivery.recover_step import recovery_of
from bonsai_fast.delivery.result_table import add_recovery
from bonsai_fast.files import check_room
from bonsai_fast.methods import WEIGHT_METHODS, Search, Task
from bonsai_fast.methods.weights.layer_by_layer import WeightTask
from bonsai_fast.prune.forecast import estimate_seconds, weight_plan
from bonsai_fast.prune.result_checks import check_model_room, result_formats
from bonsai_fast.prune.run_result import PruneResult, SparseResult
from bonsai_fast.prune.tables import plan_table, weight_plan_table
from bonsai_fast.prune.units import execute, prepare
from bonsai_fast.prune.weights import execute_weights, prepare_weights, weight_recovery_of
from bonsai_fast.recovery.recover_model import Recovery
from bonsai_fast.runs.directory import open_run, open_weight_run

Result = PruneResult | SparseResult


@dataclass(frozen=True)
class UnitJob:
    """A checked request to remove units, and perhaps to recover what is left.

    Attributes:
        task: the request.
        is_default: whether recovery was left to the preset; it is then left out where it cannot be.
    """

    task: Task[Any]
    is_default: bool

    @property
    def name(self) -> str:
        """The request as part of a file name."""
        return self.task.config.target_text.replace("=", "-")

    def plan(self, output: Path, reporter: Reporter) -> dict[str, Any]:
        """Show the work of the run in a directory, and return it as values for JSON.

        Raises:
            ValueError, OSError: recovery cannot be done, or the disk has no room.
        """
        recovery, left_out = self._recovery(output)
        check_model_room(self.task, output)
        if left_out:
            reporter.warn(left_out)
        task = _with_compensation(self.task, recovery)
        plan = task.method.plan(task)
        with reporter.busy("timing one batch"):
            seconds = estimate_seconds(task, plan)
        formats = result_formats(task)
        table = plan_table(task, plan, seconds, formats)
        values = {**asdict(plan), "seconds": seconds, "units": len(self.task.layout)}
        values |= {"formats": formats}
        values |= add_recovery(table, recovery, self.task.model)
        reporter.table(table)
        return values

    def open(self, output: Path, reporter: Reporter) -> Callable[[], Result]:
        """Start or resume the run in a directory; the returned function does the work.

        Raises:
            ValueError, OSError: the directory holds something else, or cannot be created, or
                recovery cannot be done.
        """
        recovery, left_out = self._recovery(output)
        if not output.exists():
            check_model_room(self.task, output)
        task = _with_compensation(self.task, recovery)
        run = open_run(output, task.config, task.layout, task.model, task.calibration.sha256)
        return lambda: execute(Search(task, run, reporter), recovery, left_out)

    def _recovery(self, folder: Path) -> tuple[Recovery | None, str]:
        """The recovery, checked; or why it is left out."""
        task = self.task
        texts = (task.calibration, task.evaluation)
        try:
            recovery = recovery_of(task.config, task.model, task.tokenizer, *texts)
            if recovery is not None:
                recovery = replace(recovery, is_optional=self.is_default)
                recovery.check(task.model, folder)
        except ValueError as error:
            if not self.is_default:
                raise
            return None, f"the pruned model will not be recovered: {error}"
        return recovery, ""


def _with_compensation(task: Task[Any], recovery: Recovery | None) -> Task[Any]:
    """The task, which knows whether output projections are refitted after the cut."""
    return replace(task, compensates=recovery is not None and "compensate" in recovery.tiers)


@dataclass(frozen=True)
class WeightJob:
    """A checked request to zero weights; used like `UnitJob`."""

    task: WeightTask

    @property
    def name(self) -> str:
        pattern = str(self.task.choice.pattern).replace(":", "-").replace(" ", "-")
        return f"{self.task.config.method}-{pattern}"

    def plan(self, output: Path, reporter: Reporter) -> dict[str, Any]:
        recovery = self._recovery(output)
        _check_dense_room(self.task.model, output)
        with reporter.busy("timing one layer"):
            plan = weight_plan(self.task)
        table = weight_plan_table(self.task, plan)
        values = asdict(plan) | add_recovery(table, recovery, self.task.model)
        reporter.table(table)
        return values

    def open(self, output: Path, reporter: Reporter) -> Callable[[], Result]:
        task, recovery = self.task, self._recovery(output)
        if not output.exists():
            _check_dense_room(task.model, output)
        sha256 = task.calibration.sha256 if task.calibration is not None else None
        run = open_weight_run(output, task.config, task.model, sha256)
        return lambda: execute_weights(task, run, reporter, recovery)

    def _recovery(self, folder: Path) -> Recovery | None:
        recovery = weight_recovery_of(self.task)
        if recovery is not None:
            recovery.check(self.task.model, folder)
        return recovery


def _check_dense_room(model: PreTrainedModel, output: Path) -> None:
    check_room(output, model.num_parameters() * model.dtype.itemsize, "the pruned model")


def job_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PruneConfig
) -> UnitJob | WeightJob:
    """Check the whole request but for recovery, which `plan` and `open` check.

    Raises:
        ValueError: the request cannot be met; one line.
    """
    if config.method in WEIGHT_METHODS:
        return WeightJob(prepare_weights(model, tokenizer, config))
    return UnitJob(prepare(model, tokenizer, config), is_default=config.recover is None)


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig | None = None,
    *,
    output_dir: str | Path,
    reporter: Reporter | None = None,
) -> Result:
    """Prune a model, save the result and compare it with its parent.

    Args:
        model: the parent; unchanged when this returns.
        tokenizer: its tokenizer, saved with the result.
        config: the options; defaults if None.
        output_dir: directory of the run; the model is saved in its folder `model`. The same call
            resumes an interrupted run. A finished run with another target selects again from its
            recorded scores, without a forward pass of the search.
        reporter: shows progress; on stderr if None.
    Returns:
        PruneResult, or SparseResult for a method that zeroes weights.
    Raises:
        ValueError: the request cannot be met; raised before any work is done.
        OSError: a file cannot be written.
    """
    job = job_of(model, tokenizer, config or PruneConfig())
    return job.open(Path(output_dir), reporter or Reporter())()
