"""Recovery that trains every decoder layer to give its parent's residual, one layer at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import bring_in_layer, stream_of
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.layerwise import sweep_losses
from bonsai_fast.models import find_decoder
from bonsai_fast.recovery.reconstruct.layer_outcomes import LayerOutcomes
from bonsai_fast.recovery.reconstruct.layer_training import (
    LayerOutcome,
    LayerTraining,
    train_layer,
)
from bonsai_fast.recovery.reconstruct.prefixes import OWN_STATES, Prefixes
from bonsai_fast.recovery.reconstruct.reconstruct_checks import (
    budget_of_states,
    check_models,
    check_texts,
    layer_bytes,
)
from bonsai_fast.recovery.reconstruct.training_budget import (
    LENGTH,
    Clock,
    distinct_tokens,
    training_of,
)
from bonsai_fast.recovery.recovery_task import (
    RecoveryPlan,
    RecoveryTask,
    TextWanted,
    TierRecord,
    TrainingPoint,
)

NAME = "reconstruct"


class Reconstruct:
    """Trains each decoder layer of the student to give the teacher's residual after that layer.

    One layer after another, each on the outputs of the layers trained before it. The target is the
    mean of what the teacher's layer gives on these and on the teacher's own states, so that a layer
    also corrects a part of the errors before it. Gradients stay inside the layer: beside the
    models, memory holds the hidden states of the text and one layer in float32, with its gradients
    and optimiser state.

    A layer whose output does not get closer on held-out text keeps its weights. All layers do if
    the whole model's held-out loss is worse in the end.
    """

    def text(self, options: RecoverOptions) -> TextWanted | None:
        """Random windows of the text that is trained on."""
        return TextWanted(distinct_tokens(options), LENGTH)

    def check(self, task: RecoveryTask) -> None:
        """Refuse what cannot be done, before any work.

        Raises:
            ValueError: one line.
        """
        check_models(task)
        check_texts(task)
        training_of(task)

    def plan(self, task: RecoveryTask) -> RecoveryPlan:
        """Tokens that every layer is trained on, and room for the new weights."""
        how = training_of(task)
        tokens = how.steps * how.batch * task.text.input_ids.shape[1]
        return RecoveryPlan(tokens, layer_bytes(task.student))

    def run(self, task: RecoveryTask) -> TierRecord:
        """Train all layers that are not on record in `task.folder`.

        The student is changed only at the end, if the whole of it got better.

        Raises:
            OSError: a file cannot be written.
            LedgerError: a recorded layer is damaged.
        """
        self.check(task)
        how, done = training_of(task), LayerOutcomes.read(task.folder)
        clock = Clock(task.options.recover_minutes, done.seconds)
        with PeakMemory(task.student.device) as peak:
            before, after = _held_out_losses(task, how, done, clock)
        if done.rejected is None and stream_of(task.student) is None:
            _install(task.student, done)
        tokens, curve = _curve(how, done, task.text.input_ids.shape[1])
        return TierRecord(
            NAME,
            tokens,
            clock.seconds,
            held_out_before=before,
            held_out_after=after,
            peak_bytes=peak.bytes,
            curve=curve,
            settings={
                "tokens_per_layer": how.steps * how.batch * task.text.input_ids.shape[1],
                "tokens_per_batch": how.batch * task.text.input_ids.shape[1],
                "learning_rate, relative to weights": how.learning_rate,
                "target, share on the parent's own states": OWN_STATES,
            },
            notes=_notes(how, done),
        )


def _held_out_losses(
    task: RecoveryTask, how: LayerTraining, done: LayerOutcomes, clock: Clock
) -> tuple[float, float]:
    """Next-token losses on held-out text, before and after; trains what is not on record."""
    student, teacher = task.student, task.teacher
    budget = budget_of_states(task, student)
    reserve = 0.0
    if done.held_out_before is None:
        started = clock.seconds
        losses = sweep_losses(
            student, task.held_out.input_ids, memory_budget=budget, folder=task.folder
        )
        done.held_out_before = float(losses.double().mean())
        done.save()
        reserve = clock.seconds - started
    if done.rejected is not None:
        return done.held_out_before, done.held_out_before
    text, held_out = (
        Prefixes.of(student, teacher, each.input_ids, memory_budget=budget, folder=task.folder)
        for each in (task.text, task.held_out)
    )
    num_layers = len(text.student.layers)
    with task.reporter.bar("reconstructing layers", total=num_layers) as advance:
        for number in range(num_layers):
            weights = done.weights_of(number)
            for prefixes in (text, held_out):
                prefixes.advance_teacher(number, aims=weights is None)
            if weights is None:
                outcome, weights = _train(
                    text, held_out, number, how, clock.deadline(num_layers - number, reserve)
                )
                done.add(outcome, weights, clock.seconds)
            for prefixes in (text, held_out):
                prefixes.advance_student(number, weights)
            advance(1)
    after = float(held_out.student.losses().double().mean())
    if after <= done.held_out_before:
        return done.held_out_before, after
    done.reject(after, clock.seconds)
    return done.held_out_before, done.held_out_before


def _train(
    text: Prefixes, held_out: Prefixes, number: int, how: LayerTraining, deadline: float
) -> tuple[LayerOutcome, dict[str, Tensor]]:
    """Train a layer: how it went, and its new weights by their names in the model."""
    student = text.student.model
    bring_in_layer(student, number)
    weights = dict(text.student.layers[number].named_parameters())
    found, outcome = train_layer(text, held_out, number, weights, how, deadline=deadline)
    prefix = f"{find_decoder(student).path}.{number}."
    return outcome, {prefix + name: tensor for name, tensor in found.items()}


@torch.no_grad()
def _install(student: PreTrainedModel, done: LayerOutcomes) -> None:
    """Give a student in memory its new weights."""
    for number in done.layers:
        for name, tensor in done.record[number].items():
            student.get_parameter(name).copy_(tensor)


def _curve(how: LayerTraining, done: LayerOutcomes, length: int) -> tuple[int, list[TrainingPoint]]:
    """Tokens in all, as tokens through the whole model, and a point for every trained layer."""
    tokens, curve = 0.0, []
    for outcome in done.layers.values():
        tokens += outcome.steps * how.batch * length / len(done.layers)
        if outcome.loss is not None:
            curve.append(TrainingPoint(round(tokens), outcome.loss, None))
    return round(tokens), curve


def _notes(how: LayerTraining, done: LayerOutcomes) -> list[str]:
    """What a reader should know, a line each."""
    notes = []
    if done.rejected is not None:
        notes.append(
            f"all layers keep their weights: with the new ones, held-out loss is "
            f"{done.rejected:.4f}, before it was {done.held_out_before:.4f}"
        )
    trained = [outcome for outcome in done.layers.values() if outcome.steps]
    worse = [str(outcome.layer) for outcome in trained if not outcome.is_better]
    if worse and done.rejected is None:
        notes.append(
            f"layers that keep their weights, because training did not bring their output closer "
            f"to the parent's on held-out text: {', '.join(worse)}"
        )
    steps = sum(outcome.steps for outcome in trained)
    wanted = how.steps * sum(outcome.is_trainable for outcome in done.layers.values())
    if steps < wanted:
        notes.append(f"time was up after {steps:,} of {wanted:,} steps")
    return notes
