"""What every scoring engine does: sub-models and text in, one number per pair out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bonsai_fast.config.choices import Route
from bonsai_fast.scoring.divergence import ParentReference
from bonsai_fast.scoring.output_weights import SubmodelOutputs
from bonsai_fast.scoring.sequence_nll import SequenceNLL

Progress = Callable[[int], None]


class Measure(Protocol):
    """What is computed from the last hidden states of sub-models."""

    def __call__(self, states: Tensor, input_ids: Tensor, sequences: Tensor) -> Tensor:
        """Measure some (sub-model, sequence) pairs.

        Args:
            states: [R, T, D], hidden states after the final norm.
            input_ids: int64 [R, T], the tokens of each row.
            sequences: int64 [R] on the CPU, each row's place in the text.
        Returns:
            float32 [R].
        """


@dataclass(frozen=True, eq=False)
class NextTokenLoss:
    """Measures sub-models by their mean loss in nats per predicted token; see `Measure`."""

    nll: SequenceNLL

    def __call__(self, states: Tensor, input_ids: Tensor, sequences: Tensor) -> Tensor:
        """See `Measure`."""
        return self.nll.losses_of(states, input_ids)


class Engine(Protocol):
    """Scores all pairs of a sub-model and a sequence, within a memory budget."""

    name: str

    def rows_per_batch(self, length: int, *, own_outputs: bool = False) -> int:
        """Number of pairs that are processed at once, for sequences of `length` tokens.

        Args:
            length: of a sequence.
            own_outputs: whether sub-models have their own output projections.
        Raises:
            ValueError: not even one fits into the memory budget.
        """

    def submodels_per_chunk(self, sequences: int, length: int, *, own_outputs: bool = False) -> int:
        """Number of sub-models to score in one call where the result of each call is recorded.

        Fewer would compute more than once what sub-models share; with more, more work would be lost
        when the run is interrupted.
        """

    def check_own_outputs(self) -> None:
        """Refuse to score sub-models with their own output projections.

        Raises:
            ValueError: the route does not support that.
        """

    def route_for(self, keep: Tensor, sequences: int, length: int) -> Route | None:
        """The fastest route for these sub-models on average.

        Args:
            keep: bool [S, P].
            sequences, length: of the text.
        Returns:
            The route, for `score`; None if the engine has only one.
        """

    def score(
        self,
        keep: Tensor,
        input_ids: Tensor,
        measure: Measure,
        *,
        outputs: SubmodelOutputs | None = None,
        route: Route | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Measure every pair.

        Args:
            keep: bool [S, P].
            input_ids: int64 [B, T].
            measure: what is computed from the last hidden states.
            outputs: the sub-models' own output projections; None: all have the parent's.
            route: from `route_for`, where several calls should share one; None: the fastest for
                these sub-models.
            progress: called now and then with the number of pairs done since the last call.
        Returns:
            float32 [S, B] on the CPU.
        """

    def parent_reference(self, input_ids: Tensor) -> ParentReference:
        """What the parent predicts for int64 [B, T]; on the CPU."""
