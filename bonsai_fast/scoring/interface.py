"""What every engine does: sub-models and text in, losses out, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from bonsai_fast.scoring.sequence_nll import ParentReference

Progress = Callable[[int], None]


class Engine(Protocol):
    """Scores all pairs of a sub-model and a sequence."""

    name: str

    def rows_per_batch(self, length: int) -> int:
        """Pairs that are in flight at once, for sequences of `length` tokens.

        Raises:
            ValueError: not even one fits into the memory budget.
        """

    def submodels_per_call(self, sequences: int, length: int) -> int:
        """Sub-models that should be scored in one call where each call's result is recorded."""

    def one_route(self, keep: Tensor, sequences: int, length: int) -> AbstractContextManager[None]:
        """While this holds, all sub-models are computed by the way that suits these on average.

        Args:
            keep: bool [S, P].
            sequences, length: of the text.
        """

    def score(
        self,
        keep: Tensor,
        input_ids: Tensor,
        parent: ParentReference | None,
        progress: Progress | None,
    ) -> Tensor:
        """Loss of every pair, or its divergence from the parent if that is given.

        Args:
            keep: bool [S, P].
            input_ids: int64 [B, T].
            parent: what the parent predicts for these sequences, on the CPU.
            progress: called with the number of pairs done, every now and then.
        Returns:
            float32 [S, B] on the CPU, nats per predicted token.
        """

    def parent(self, input_ids: Tensor) -> ParentReference:
        """What the parent predicts for int64 [B, T]; on the CPU."""
