"""One text before a layer of the student, and what the teacher wants after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import exchanged_weights
from bonsai_fast.layerwise import Sweep
from bonsai_fast.layerwise.hidden_states import HiddenStates

# The target: this share of what the parent's layer gives on the parent's own states, the rest on
# those of the student. 1 corrects all of the error of earlier layers, but perplexity is then worse.
OWN_STATES = 0.5
# a token whose residual is zero in the target has no relative error
LEAST_SQUARE = 1e-12


@dataclass(frozen=True, eq=False)
class Prefixes:
    """One text before a layer of the student, and what the student's layer should give.

    Attributes:
        student, teacher: sweeps over the same text.
        targets: [B, T, D], after the layer that the teacher passed last.
    """

    student: Sweep
    teacher: Sweep
    targets: HiddenStates

    @classmethod
    def of(
        cls,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        input_ids: Tensor,
        *,
        memory_budget: int,
        folder: Path,
    ) -> Prefixes:
        """Both at the first layer.

        Args:
            student, teacher, input_ids, folder: as in `Sweep`.
            memory_budget: bytes for each sweep, and for the targets.
        """
        in_student, in_teacher = (
            Sweep(model, input_ids, memory_budget=memory_budget, folder=folder)
            for model in (student, teacher)
        )
        states = in_teacher.states(slice(1))
        targets = HiddenStates(
            (len(input_ids), *states.shape[1:]),
            states.dtype,
            device=student.device,
            room=memory_budget,
            folder=folder,
        )
        return cls(in_student, in_teacher, targets)

    @property
    def num_sequences(self) -> int:
        return len(self.student.input_ids)

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.student.input_ids.shape[1]

    @torch.no_grad()
    def advance_teacher(self, number: int, *, aims: bool) -> None:
        """Pass the teacher's next layer, before the student does.

        Args:
            number: of the layer.
            aims: whether targets for the student's layer are wanted.
        """
        for batch in self.teacher.batches:
            own = self.teacher.output(number, batch)
            if aims:
                states = self.student.states(batch).to(own.device, own.dtype)
                self.targets[batch] = torch.lerp(
                    self.teacher.apply(number, states).float(), own.float(), OWN_STATES
                )
            self.teacher.advance_batch(number, batch, own)

    def advance_student(self, number: int, weights: Mapping[str, Tensor]) -> None:
        """Pass the student's next layer with new weights, named as in the model."""
        with exchanged_weights(self.student.model, {number: weights}.get):
            self.student.advance(number)

    def error(self, number: int, weights: Mapping[str, Tensor], rows: slice | Tensor) -> Tensor:
        """How far the student's layer is from its target: float32, a scalar.

        The squared error of a token is divided by the mean square of its target: the first token's
        is thousands of times as large as others', and would be all that counts. The mean is over
        tokens.

        Args:
            number: of the layer that the student passes next and the teacher has passed.
            weights: of the student's layer, by their names in the layer; gradients flow into them.
            rows: which sequences, as in `Sweep.states`.
        """
        found = self.student.apply(number, self.student.states(rows), weights).float()
        wanted = self.targets[rows].float()
        weight = wanted.square().mean(-1).clamp_min(LEAST_SQUARE).reciprocal()
        return ((found - wanted).square().mean(-1) * weight).mean()

    @torch.no_grad()
    def mean_error(
        self, number: int, weights: Mapping[str, Tensor], rows: int, batch: int
    ) -> float:
        """`error` of the first sequences, in batches.

        Args:
            number, weights: as in `error`.
            rows: number of sequences.
            batch: sequences at a time.
        """
        total = 0.0
        for start in range(0, rows, batch):
            part = slice(start, min(start + batch, rows))
            total += (part.stop - part.start) * float(self.error(number, weights, part))
        return total / rows
