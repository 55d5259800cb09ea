"""The tiers that train a pruned model: "distill", and the training that four papers publish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.config.choices import Tier
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.recovery.distill.choose_trained import choose_trained
from bonsai_fast.recovery.distill.distillation_loss import DistillationLoss, LogitHead
from bonsai_fast.recovery.distill.held_out_loss import HeldOutLoss
from bonsai_fast.recovery.distill.layer_checkpointing import decoder_layers, fit_batch
from bonsai_fast.recovery.distill.lora_adapters import adapted_layers, check_installed
from bonsai_fast.recovery.distill.merge_check import some_logits
from bonsai_fast.recovery.distill.processes import Processes
from bonsai_fast.recovery.distill.recipe_choice import text_of
from bonsai_fast.recovery.distill.teacher_choice import open_teacher
from bonsai_fast.recovery.distill.teacher_states import LiveStates
from bonsai_fast.recovery.distill.text_order import TextOrder
from bonsai_fast.recovery.distill.training_checks import (
    check_disk,
    check_hidden_term,
    check_models,
    check_text,
)
from bonsai_fast.recovery.distill.training_clock import TrainingClock
from bonsai_fast.recovery.distill.training_loop import (
    CHECKPOINT_SECONDS,
    TrainingLoop,
    autocast,
    runs_in_autocast,
)
from bonsai_fast.recovery.distill.training_plan import TrainingPlan
from bonsai_fast.recovery.distill.training_state import Progress, TrainingFiles
from bonsai_fast.recovery.distill.zero_masks import find_zeros
from bonsai_fast.recovery.recovery_task import RecoveryPlan, RecoveryTask, TextWanted, TierRecord
from bonsai_fast.scoring import SequenceNLL
from bonsai_fast.scoring.sequence_nll import evaluation_mode

# nats; a merge that costs more is noted
MERGE_TOLERANCE = 0.02


@dataclass(frozen=True)
class DistillTier:
    """A tier that trains; see `RecoveryTier`.

    Attributes:
        name: "distill", or that of a published recipe.
        checkpoint_seconds: least time between two checkpoints.
    """

    name: Tier
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def text(self, options: RecoverOptions) -> TextWanted:
        """See `RecoveryTier`."""
        return text_of(self.name, options)

    def check(self, task: RecoveryTask) -> None:
        """See `RecoveryTier`."""
        check_models(task)
        plan = TrainingPlan(self.name, task)
        check_text(task, plan.recipe)
        check_hidden_term(task, plan.recipe)
        if plan.recipe.weights == "lora":
            check_installed()
            adapted_layers(task.student, plan.recipe.adapted)
        check_disk(task.folder, plan.disk_bytes)
        TrainingFiles(task.folder, plan.identity).find()
        for model in (task.student, task.teacher):
            SequenceNLL(model)

    def plan(self, task: RecoveryTask) -> RecoveryPlan:
        """See `RecoveryTier`. On the disk are the parent's states, and those of the training."""
        plan = TrainingPlan(self.name, task)
        return RecoveryPlan(tokens=plan.sequences * plan.length, disk_bytes=plan.disk_bytes)

    def run(self, task: RecoveryTask) -> TierRecord:
        """See `RecoveryTier`.

        With several processes (`accelerate launch`, `torchrun`), each calls this with the same task
        on its own device and ends with the same model; the folder must be one that all see.

        Raises:
            TrainingError: the loss is not finite.
            OSError: a file cannot be written.
        """
        plan = TrainingPlan(self.name, task)
        processes = Processes(task.student.device)
        for model in (task.student, task.teacher):
            if stream_of(model) is None and model.device != processes.device:
                nn.Module.to(model, processes.device)
        clock = TrainingClock(plan.sequences, task.options.recover_minutes, processes)
        task.folder.mkdir(parents=True, exist_ok=True)
        files = TrainingFiles(task.folder, plan.identity)
        found = files.find()
        processes.wait()
        progress = found or Progress()
        clock.resume(progress.seconds)
        nll = SequenceNLL(task.student)
        peak = PeakMemory(task.student.device)
        with evaluation_mode(task.student):
            if found is None:
                before = _held_out(task, nll, processes)
                progress.held_out_before = progress.lowest = progress.best = before
            with _in_float32(task.student), peak:
                notes, settings = self._train(
                    plan, nll, processes, clock, files, progress, resumes=found is not None
                )
            after = _held_out(task, nll, processes)
        if progress.stopped:
            notes.append(f"stopped after {progress.steps} steps: {progress.stopped}")
        if progress.best_step < progress.steps:
            notes.append(
                f"the weights after step {progress.best_step} of {progress.steps} were best on "
                "held-out text and are kept"
            )
        if (cost := after - progress.best) > MERGE_TOLERANCE:
            notes.append(f"rounding to the model's dtype costs {cost:.3f} nats on held-out text")
        return TierRecord(
            name=self.name,
            tokens=progress.sequences * plan.length,
            seconds=clock.seconds,
            held_out_before=progress.held_out_before,
            held_out_after=after,
            peak_bytes=peak.bytes,
            curve=progress.curve,
            settings=plan.recipe.settings() | settings,
            notes=notes,
        )

    def _train(
        self,
        plan: TrainingPlan,
        nll: SequenceNLL,
        processes: Processes,
        clock: TrainingClock,
        files: TrainingFiles,
        progress: Progress,
        *,
        resumes: bool,
    ) -> tuple[list[str], dict[str, float | int | str]]:
        """Train and merge; returns notes and what was chosen."""
        task, student = plan.task, plan.task.student
        reporter = task.reporter if processes.is_main else Reporter(quiet=True)
        batching = fit_batch(
            student, plan.rows(processes.count), plan.length, reserved=plan.training_bytes
        )
        layers = decoder_layers(student) if batching.checkpoints else []
        zeros = find_zeros(student, task.teacher)
        head, held_out_ids = LogitHead.of(nll), task.held_out.input_ids
        with open_teacher(plan, processes, reporter) as (teacher, parent_head):
            with torch.random.fork_rng(_devices(student)):
                torch.manual_seed(task.seed)
                in_autocast = runs_in_autocast(student)
                trained = choose_trained(student, plan.recipe, zeros, autocast=in_autocast)
            held_out = HeldOutLoss(
                nll, head, held_out_ids, processes=processes, context=lambda: autocast(student)
            )
            loop = TrainingLoop(
                student=student,
                nll=nll,
                trained=trained,
                recipe=plan.recipe,
                loss=DistillationLoss(head, parent_head or head, plan.recipe.terms),
                teacher=teacher,
                # text that a model wrote is a tensor of inference mode, which autograd refuses
                input_ids=task.text.input_ids.clone(),
                held_out=held_out,
                order=TextOrder(len(task.text.input_ids), task.seed),
                clock=clock,
                rows=batching.rows,
                measurements=plan.measurements,
                checkpointed=layers,
                seed=task.seed,
                files=files,
                processes=processes,
                reporter=reporter,
                checkpoint_seconds=self.checkpoint_seconds,
            )
            try:
                loop.run(progress, resumes=resumes)
                before = some_logits(nll, held_out_ids, autocast(student))
            finally:
                trained.finish()
        change = some_logits(nll, held_out_ids, nullcontext()) - before
        notes = plan.notes
        if zeros is not None:
            zeros.check(student)
            notes.append(f"all {zeros.count:,} zeros of the sparse weights are kept")
        how = "live" if isinstance(teacher, LiveStates) else "cached"
        return notes, {
            "optimiser_steps": progress.steps,
            "sequence_length": plan.length,
            "sequences_at_once": batching.rows,
            "processes": processes.count,
            "teacher": "not used" if teacher is None else how,
            "gradient_checkpointing": "on" if batching.checkpoints else "off",
            "trained_parameters": sum(x.numel() for x in trained.parameters.values()),
            "largest_logit_change_by_merge": float(change.abs().max()),
        }


def _held_out(task: RecoveryTask, nll: SequenceNLL, processes: Processes) -> float:
    """Loss of the student as it is, in its own dtype."""
    head = LogitHead.of(nll)
    return HeldOutLoss(
        nll, head, task.held_out.input_ids, processes=processes, context=nullcontext
    )()


def _devices(model: PreTrainedModel) -> list[torch.device]:
    """Devices whose random numbers are used, beside the CPU."""
    return [model.device] if model.device.type == "cuda" else []


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a float16 model is in float32: float16 gives NaN in training."""
    if model.dtype != torch.float16:
        yield
        return
    model.float()
    try:
        yield
    finally:
        model.half()
