"""A request to recover a saved model: check it, show its plan, run it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.finite import check_finite
from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.config.choices import Tier
from bonsai_fast.config.recover_config import RecoverConfig
from bonsai_fast.console import Reporter
from bonsai_fast.delivery.deliver import deliver, drop_recovery
from bonsai_fast.delivery.model_result import recorded_result
from bonsai_fast.delivery.pruned_model import PrunedModel, StreamedStudent, Student
from bonsai_fast.delivery.recover_step import FOLDER
from bonsai_fast.delivery.result_table import add_recovery
from bonsai_fast.evaluation.text import (
    EVALUATION_LENGTH,
    Sequences,
    calibration_sequences,
    evaluation_sequences,
    longest_window,
)
from bonsai_fast.files import check_room
from bonsai_fast.models.layout import Layout
from bonsai_fast.recover.recover_result import RecoverResult
from bonsai_fast.recover.student_checks import (
    ZEROED,
    check_heads,
    check_quantised,
    check_tokenizers,
    is_alike,
    zero_share,
)
from bonsai_fast.recovery.recover_model import Recovery, prepare_recovery
from bonsai_fast.recovery.tiers import steps_of
from bonsai_fast.report.recovered_page import write_recovered_report
from bonsai_fast.runs.directory import RecoverRun, open_recover_run
from bonsai_fast.surgery.save import check_savable


@dataclass(frozen=True, eq=False)
class RecoverJob:
    """A checked request.

    Attributes:
        student: the pruned model, in memory or streamed. In memory it will be changed.
        recovery: the tiers with their text.
        config: what was asked for.
        calibration, evaluation: the texts.
        zeros: share of zeros in the pruned model's decoder.
        report: what bonsai_report.json of the pruned model says.
    """

    student: PreTrainedModel
    recovery: Recovery
    config: RecoverConfig
    calibration: Sequences
    evaluation: Sequences
    zeros: float
    report: dict[str, Any]

    def plan(self, output: Path, reporter: Reporter) -> dict[str, Any]:
        """Show the work in a directory, and return it as values for JSON.

        Raises:
            ValueError, OSError: a tier cannot do it, or the disk has no room.
        """
        self.recovery.check(self.student, output)
        self._check_room(output)
        table = Table(title=f"plan for {self.config.recover}", show_header=False)
        table.add_row("calibration", f"{self.calibration.source}: {self.calibration.description}")
        held_out = self.recovery.held_out
        table.add_row("held out", f"{held_out.source}: {held_out.description}")
        values = add_recovery(table, self.recovery, self.student)
        reporter.table(table)
        return values

    def open(self, output: Path, reporter: Reporter) -> Callable[[], RecoverResult]:
        """Start or resume in a directory; the returned function does the work.

        Raises:
            ValueError, OSError: the directory holds something else or cannot be created, or a tier
                cannot do it.
        """
        self.recovery.check(self.student, output)
        if not output.exists():
            self._check_room(output)
        teacher, sha256 = self.recovery.teacher, self.calibration.sha256
        run = open_recover_run(output, self.config, self.student, teacher, sha256)
        return lambda: self._execute(run, reporter)

    def _check_room(self, output: Path) -> None:
        size = self.student.num_parameters() * self.student.dtype.itemsize
        check_room(output, size, "the recovered model")

    def help_out(self, output: Path) -> None:
        """Help another process that executes the same request in this directory."""
        self.recovery.help_out(self.student, output / FOLDER)

    def _execute(self, run: RecoverRun, reporter: Reporter) -> RecoverResult:
        started, warnings_before = time.perf_counter(), len(reporter.warnings)
        if run.start == "finished":
            drop_recovery(run)  # in case the last start was killed just before it did
            return recorded_result(run, RecoverResult, reporter)
        teacher = self.recovery.teacher
        delivery = deliver(
            self._pruned(run, reporter),
            run,
            self.evaluation,
            recovery=self.recovery,
            report=self.report,
            tasks=[],
        )
        removed = teacher.num_parameters() - delivery.parameters
        layout = Layout.of(teacher)
        result = RecoverResult(
            **delivery.as_result(run),
            sparsity=removed / layout.num_decoder_parameters,
            sparsity_total=removed / layout.num_model_parameters,
            parameters_dense=layout.num_model_parameters,
            zeros=self.zeros,
            warnings=reporter.warnings[warnings_before:],
            seconds=time.perf_counter() - started,
        )
        run.record("finished", result=asdict(result))
        reporter.note(f"report: {write_recovered_report(run.path)}")
        drop_recovery(run)
        return result

    def _pruned(self, run: RecoverRun, reporter: Reporter) -> PrunedModel:
        teacher, tokenizer = self.recovery.teacher, self.recovery.tokenizer
        common = (teacher, tokenizer, run.model_directory, reporter)
        if stream_of(self.student) is None:
            return Student(*common, self.student)
        return StreamedStudent(*common, self.student, lambda _: None)


def recover_job(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RecoverConfig,
    *,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    report: dict[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> RecoverJob:
    """Check the whole request, before any work is done.

    Args:
        student: the pruned model.
        teacher, tokenizer: its parent.
        config: what is asked for.
        student_tokenizer: the pruned model's own, to be compared with the parent's.
        report: content of the pruned model's bonsai_report.json, kept in the new one.
        reporter: told what is left out.
    Raises:
        ValueError: the request cannot be met; one line.
    """
    for what, model in (("the pruned model", student), ("the parent", teacher)):
        check_quantised(model.config, what)
        check_finite(model, what)
    check_savable(student, tokenizer)
    check_heads(student, teacher)
    if student_tokenizer is not None:
        check_tokenizers(student_tokenizer, tokenizer)
    assert config.recover is not None
    zeros, by_layer = zero_share(student), is_alike(student, teacher)
    wanted = steps_of(config.recover)
    steps = steps_of(config.recover, zeros=zeros > ZEROED, by_layer=by_layer)
    _note_left_out(wanted, steps, zeros, reporter)
    length = min(config.sequence_length, longest_window(student))
    calibration = calibration_sequences(
        config.calibration, tokenizer, num_sequences=config.num_sequences, length=length,
        seed=config.seed, model=teacher,
    )  # fmt: skip
    source = "builtin" if config.calibration == "self" else config.calibration
    evaluation = evaluation_sequences(
        config.evaluation or source, tokenizer, max_tokens=config.evaluation_tokens,
        length=min(EVALUATION_LENGTH, longest_window(student), config.evaluation_tokens),
        calibration=config.calibration,
    )  # fmt: skip
    recovery = prepare_recovery(
        config.recovery,
        teacher=teacher,
        tokenizer=tokenizer,
        calibration=calibration,
        evaluation=evaluation,
        seed=config.seed,
        memory_budget=config.memory_budget,
        zeros=zeros > ZEROED,
        by_layer=by_layer,
    )
    assert recovery is not None  # `config` refuses none
    without = ("written_by", "measured", "parent", "recovery")
    kept = {name: value for name, value in (report or {}).items() if name not in without}
    shown = zeros if zeros > ZEROED else 0.0
    return RecoverJob(student, recovery, config, calibration, evaluation, shown, kept)


def recover(
    student: PreTrainedModel,
    *,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    method: Tier = "compensate",
    config: RecoverConfig | None = None,
    reporter: Reporter | None = None,
) -> RecoverResult:
    """Make a pruned model better, save the result and compare it with its parent.

    Args:
        student: the pruned model. In memory it is changed; a streamed one is not.
        teacher: its parent, with the same tokenizer; unchanged.
        tokenizer: of both, saved with the result.
        output_dir: a new directory; the model is saved in its folder `model`. The same call resumes
            an interrupted one.
        method: what to do.
        config: other options; its `recover` is replaced by `method`. Defaults if None.
        reporter: shows progress; on stderr if None.
    Returns:
        perplexities before and after, and what each tier did.
    Raises:
        ValueError: the request cannot be met; raised before any work is done.
        OSError: a file cannot be written.
    """
    asked = RecoverConfig(recover=method) if config is None else replace(config, recover=method)
    reporter = reporter or Reporter()
    job = recover_job(student, teacher, tokenizer, asked, reporter=reporter)
    return job.open(Path(output_dir), reporter)()


def _note_left_out(
    wanted: tuple[Tier, ...], steps: tuple[Tier, ...], zeros: float, reporter: Reporter | None
) -> None:
    left_out = [tier for tier in wanted if tier not in steps]
    if left_out and reporter is not None:
        why = (
            f"{zeros:.0%} of the decoder's weights are zero and have to stay zero"
            if zeros > ZEROED
            else "the pruned model has other layers than its parent"
        )
        reporter.note(f"{', '.join(left_out)} is left out: {why}")
