"""A request of either kind, units removed or weights zeroed, as the commands handle it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.config import PruneConfig
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods import METHODS, Search, Task
from bonsai_fast.methods.weights.layer_by_layer import WeightTask
from bonsai_fast.prune.tables import estimate_seconds, plan_table, result_table
from bonsai_fast.prune.units import PruneResult, execute, prepare
from bonsai_fast.prune.weight_tables import sparse_table, weight_plan, weight_plan_table
from bonsai_fast.prune.weights import SparseResult, execute_weights, prepare_weights
from bonsai_fast.runs.directory import open_run, open_weight_run

Result = PruneResult | SparseResult


class Job(Protocol):
    """A request that has been checked."""

    @property
    def name(self) -> str:
        """What is asked for, as a part of a file name."""

    def plan(self, reporter: Reporter) -> dict[str, Any]:
        """Show what would be done, and return it for JSON."""

    def open(self, output: Path, reporter: Reporter) -> Callable[[], Result]:
        """Start or resume it in a directory; what is returned does the work.

        Raises:
            ValueError, OSError: the directory holds something else, or cannot be made.
        """


@dataclass(frozen=True)
class UnitJob:
    """Units are removed."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    evaluation: Sequences

    @property
    def name(self) -> str:
        return self.task.config.target_text.replace("=", "-")

    def plan(self, reporter: Reporter) -> dict[str, Any]:
        plan = METHODS[self.task.config.method].plan(self.task)
        with reporter.busy("timing one batch"):
            seconds = estimate_seconds(self.task, plan)
        reporter.table(plan_table(self.task, plan, seconds))
        return {**asdict(plan), "seconds": seconds, "units": len(self.task.layout)}

    def open(self, output: Path, reporter: Reporter) -> Callable[[], Result]:
        task = self.task
        run = open_run(output, task.config, task.layout, task.model, task.calibration.sha256)
        return lambda: execute(Search(task, run, reporter), self.tokenizer, self.evaluation)


@dataclass(frozen=True)
class WeightJob:
    """Weights are zeroed."""

    task: WeightTask

    @property
    def name(self) -> str:
        pattern = str(self.task.choice.pattern).replace(":", "-").replace(" ", "-")
        return f"{self.task.config.method}-{pattern}"

    def plan(self, reporter: Reporter) -> dict[str, Any]:
        with reporter.busy("timing one layer"):
            plan = weight_plan(self.task)
        reporter.table(weight_plan_table(self.task, plan))
        return asdict(plan)

    def open(self, output: Path, reporter: Reporter) -> Callable[[], Result]:
        task = self.task
        sha256 = task.calibration.sha256 if task.calibration is not None else None
        run = open_weight_run(output, task.config, task.model, sha256)
        return lambda: execute_weights(task, run, reporter)


def job_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig,
) -> Job:
    """Check everything that can be refused, before any work is done.

    Raises:
        ValueError: in one line.
    """
    if config.prunes_weights:
        return WeightJob(prepare_weights(model, tokenizer, config))
    task, evaluation = prepare(model, tokenizer, config)
    return UnitJob(task, tokenizer, evaluation)


def table_of(result: Result) -> Table:
    """The comparison that a person reads at the end."""
    return result_table(result) if isinstance(result, PruneResult) else sparse_table(result)


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
        config: what to do; the default configuration if None.
        output_dir: the run's directory. The same call there resumes; another target there, once the
            run has finished, is met from the recorded evaluations alone. The model is saved in its
            folder `model`.
        reporter: where progress is shown; stderr if None.
    Returns:
        PruneResult, or SparseResult for a method that zeroes weights.
    Raises:
        ValueError: anything about the request that cannot be met, before any work is done.
        OSError: a file could not be written.
    """
    job = job_of(model, tokenizer, config or PruneConfig())
    return job.open(Path(output_dir), reporter or Reporter())()
