"""The training loop: batches, steps, measurements on held-out text, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.console import Reporter
from bonsai_fast.recovery.distill.distillation_loss import DistillationLoss
from bonsai_fast.recovery.distill.held_out_loss import HeldOutLoss
from bonsai_fast.recovery.distill.layer_checkpointing import checkpointed
from bonsai_fast.recovery.distill.processes import Processes
from bonsai_fast.recovery.distill.recipe import Recipe
from bonsai_fast.recovery.distill.teacher_states import TeacherStates
from bonsai_fast.recovery.distill.text_order import TextOrder
from bonsai_fast.recovery.distill.trained_part import TrainedParts
from bonsai_fast.recovery.distill.training_clock import TrainingClock
from bonsai_fast.recovery.distill.training_state import Progress, TrainingFiles
from bonsai_fast.recovery.recovery_task import TrainingPoint
from bonsai_fast.recovery.training_error import TrainingError
from bonsai_fast.scoring import SequenceNLL
from bonsai_fast.scoring.sequence_nll import predicting_states

# points of the curve, beside the measurements on held-out text
POINTS = 40
# measurements without a better one, after which training stops; much of the gain comes at the end,
# where the learning rate is low
PATIENCE = 4
# nats per token that a later state may be worse: that little is noise, and later ones are steadier
TIE = 0.002
CHECKPOINT_SECONDS = 60.0
# checkpoints take at most one part in this many of the time
CHECKPOINT_SHARE = 20

Show = Callable[[float, str], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingLoop:
    """Trains parts of a model.

    Attributes:
        student: the model.
        nll: its last hidden states.
        trained: what is trained.
        recipe: how.
        loss: on last hidden states.
        teacher: the parent's; None if the loss does not need them.
        input_ids: int64 [B, T] on the CPU.
        held_out: measures the model.
        order: of the sequences.
        clock: says how much is done.
        rows: sequences that are run at once.
        measurements: how often the model is measured.
        checkpointed: layers that are computed again in the backward pass.
        seed: of dropout.
        files: where the state is kept.
        processes: that train together.
        reporter: shows progress.
        checkpoint_seconds: least time between two checkpoints.
    """

    student: PreTrainedModel
    nll: SequenceNLL
    trained: TrainedParts
    recipe: Recipe
    loss: DistillationLoss
    teacher: TeacherStates | None
    input_ids: Tensor
    held_out: HeldOutLoss
    order: TextOrder
    clock: TrainingClock
    rows: int
    measurements: int
    checkpointed: Sequence[nn.Module]
    seed: int
    files: TrainingFiles
    processes: Processes
    reporter: Reporter
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def run(self, progress: Progress, *, resumes: bool) -> None:
        """Train until tokens, time or patience end; the best parameters are then in the model.

        Args:
            progress: of an earlier start, or of none; it is brought up to date.
            resumes: whether the folder holds that start.
        Raises:
            TrainingError: the loss is not finite.
            OSError: a file cannot be written.
        """
        parameters = self.trained.parameters
        optimiser = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0)
        if resumes:
            self.files.load(parameters, optimiser)
            self.processes.wait()
        elif self.processes.is_main:
            self.files.save_best(0, parameters)
        if not progress.is_finished:
            with self._training(), self.reporter.training_bar(self.recipe.name) as show:
                self._steps(progress, optimiser, show)
            progress.is_finished = True
            if self.processes.is_main:
                self._save(progress, optimiser)
            self.processes.wait()
        if progress.best_step != progress.steps:
            self.trained.load(self.files.load_best(progress.best_step))

    def _steps(self, progress: Progress, optimiser: torch.optim.Optimizer, show: Show) -> None:
        saved, pause = time.perf_counter(), self.checkpoint_seconds
        began, first = time.perf_counter(), progress.sequences
        share = self.clock.share(progress.sequences)
        while share < 1.0:
            loss = self._step(progress, optimiser, share)
            progress.loss_sum += loss
            progress.loss_steps += 1
            share = self.clock.share(progress.sequences)
            self._record(progress, share)
            if progress.stopped:
                return
            speed = self._tokens(progress.sequences - first) / (time.perf_counter() - began)
            show(share, f"loss {loss:.4f}, {speed:,.0f} tokens/s, {self._left(share)}")
            if self.processes.is_main and time.perf_counter() - saved >= pause:
                start = time.perf_counter()
                self._save(progress, optimiser)
                saved = time.perf_counter()
                pause = max(self.checkpoint_seconds, CHECKPOINT_SHARE * (saved - start))

    def _step(self, progress: Progress, optimiser: torch.optim.Optimizer, share: float) -> float:
        """One step; returns its loss, the mean over all tokens of the batch."""
        end = min(progress.sequences + self.recipe.batch, self.clock.total)
        batch = self.order[range(progress.sequences, end)]
        tokens = len(batch) * (self.input_ids.shape[1] - 1)
        mine = batch[self.processes.index :: self.processes.count]
        if self.recipe.dropout:
            # of this step and process, so that nothing must be saved
            torch.manual_seed(
                (self.seed * 1_000_003 + progress.steps) * 1_009 + self.processes.index
            )
        total = torch.zeros((), device=self.student.device)
        with self.trained.with_dropout():
            for part in mine.split(self.rows) if len(mine) else ():
                loss = self._loss(part) / tokens
                loss.backward()
                total += loss.detach()
        value = float(self.processes.sum(total))
        self._check(value, progress)
        parameters = self.trained.parameters.values()
        self.processes.sum_gradients(parameters)
        self.trained.mask_gradients()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        self._check(float(norm), progress)
        for group in optimiser.param_groups:
            group["lr"] = self.recipe.rate(progress.steps, share)
        optimiser.step()
        optimiser.zero_grad()
        progress.steps += 1
        progress.sequences = end
        return value

    def _loss(self, numbers: Tensor) -> Tensor:
        """Summed loss of some sequences."""
        input_ids = self.input_ids[numbers].to(self.student.device)
        parent = None
        if self.teacher is not None:
            parent = predicting_states(self.teacher(numbers)).to(input_ids.device)
        with autocast(self.student):
            states = predicting_states(self.nll.states(input_ids))
        return self.loss(states, parent, input_ids[:, 1:].reshape(-1))

    def _record(self, progress: Progress, share: float) -> None:
        """Add a point to the curve where one is due, and measure the model where that is due."""
        measured = None
        if int(share * self.measurements) > progress.milestones:
            progress.milestones = int(share * self.measurements)
            measured = self.held_out()
            self._check(measured, progress)
            if measured < progress.lowest + TIE:
                progress.best, progress.best_step = measured, progress.steps
                if self.processes.is_main:
                    self.files.save_best(progress.steps, self.trained.parameters)
            if measured < progress.lowest:
                progress.lowest, progress.worse = measured, 0
            else:
                progress.worse += 1
                if progress.worse >= PATIENCE:
                    progress.stopped = f"no better on held-out text {PATIENCE} times"
        tokens = self._tokens(progress.sequences)
        last = progress.curve[-1].tokens if progress.curve else 0
        spacing = self._tokens(self.clock.total) / POINTS
        if measured is None and tokens - last < spacing and share < 1.0:
            return
        loss = progress.loss_sum / progress.loss_steps
        progress.curve.append(TrainingPoint(tokens, loss, measured))
        progress.loss_sum, progress.loss_steps = 0.0, 0
        if measured is not None:
            self.reporter.note(
                f"{self.recipe.name}: {tokens:,} tokens, loss {loss:.4f}, held-out {measured:.4f} "
                f"(before: {progress.held_out_before:.4f}), {self._left(share)}"
            )

    def _check(self, value: float, progress: Progress) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.recipe.name}: the loss or its gradient is {value} in step "
                f"{progress.steps + 1}; train with a lower learning rate, or in bfloat16 or float32"
            )

    def _left(self, share: float) -> str:
        seconds = self.clock.seconds * (1 - share) / share
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _tokens(self, sequences: int) -> int:
        return sequences * self.input_ids.shape[1]

    def _save(self, progress: Progress, optimiser: torch.optim.Optimizer) -> None:
        progress.seconds = self.clock.seconds
        self.files.save(progress, self.trained.parameters, optimiser)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Inside, some layers are checkpointed, and random numbers are our own."""
        device = self.student.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            checkpointed(self.checkpointed),
        ):
            yield


def runs_in_autocast(model: PreTrainedModel) -> bool:
    """Whether it is a bfloat16 model; its embeddings tell, as they are never trained."""
    return bool(model.get_input_embeddings().weight.dtype == torch.bfloat16)


def autocast(model: PreTrainedModel) -> torch.autocast:
    """In which a model is trained: products of a bfloat16 model are taken in bfloat16."""
    enabled = runs_in_autocast(model)
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=enabled)
