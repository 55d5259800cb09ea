"""One text in both models: before a layer of the student and after that layer of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import exchanged_weights
from bonsai_fast.layerwise import Sweep

# a token whose residual is zero in the teacher has no relative error
LEAST_SQUARE = 1e-12


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The hidden states of one text, in student and teacher.

    Attributes:
        student, teacher: sweeps over the same text.
    """

    student: Sweep
    teacher: Sweep

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
        """Both at the first layer; arguments as in `Sweep`, and the budget is that of each."""
        return cls(
            Sweep(student, input_ids, memory_budget=memory_budget, folder=folder),
            Sweep(teacher, input_ids, memory_budget=memory_budget, folder=folder),
        )

    @property
    def num_sequences(self) -> int:
        return len(self.student.input_ids)

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.student.input_ids.shape[1]

    def advance_student(self, number: int, weights: Mapping[str, Tensor]) -> None:
        """Pass the student's next layer with new weights, named as in the model."""
        with exchanged_weights(self.student.model, {number: weights}.get):
            self.student.advance(number)

    def error(self, number: int, weights: Mapping[str, Tensor], rows: slice | Tensor) -> Tensor:
        """How far the student's layer is from the teacher's residual after it: float32, a scalar.

        The squared error of a token is divided by the mean square of the teacher's residual: the
        first token's is 80 times as large as others', and would be all that counts. The mean is
        over tokens.

        Args:
            number: of the layer that the student reads next and the teacher has passed.
            weights: of the student's layer, by their names in the layer; gradients flow into them.
            rows: which sequences, as in `Sweep.states`.
        """
        found = self.student.apply(number, self.student.states(rows), weights).float()
        wanted = self.teacher.states(rows).to(found.device).float()
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
