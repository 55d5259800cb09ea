"""Scoring on one text: sub-models in chunks of a fixed size, all by the same route."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bonsai_fast.config.choices import Route
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.divergence import Divergence
from bonsai_fast.scoring.interface import Engine, Measure, NextTokenLoss, Progress
from bonsai_fast.scoring.output_weights import (
    OutputTensors,
    OutputWeights,
    SubmodelOutputs,
    submodel_outputs,
)
from bonsai_fast.scoring.sequence_nll import SequenceNLL


class ScoringSession:
    """One text on which sub-models are scored; made by `MaskScorer.session`.

        session = scorer.session(input_ids)
        for chunk in session.chunks(keep):
            losses = chunk.losses()

    Attributes:
        input_ids: int64 [B, T], the text.
        output_weights: own output projections of the sub-models; None: all have the parent's.
    """

    def __init__(
        self,
        engine: Engine,
        layout: Layout,
        nll: SequenceNLL,
        input_ids: Tensor,
        output_weights: OutputWeights | OutputTensors | None = None,
    ) -> None:
        self.engine, self.input_ids = engine, input_ids
        self.output_weights = output_weights
        self.loss_measure = NextTokenLoss(nll)
        self._layout, self._nll = layout, nll

    @cached_property
    def submodels_per_chunk(self) -> int:
        """Number of sub-models to score in one call where the result of each call is recorded.

        Raises:
            ValueError: the memory budget is too small for one sequence.
        """
        own_outputs = self.output_weights is not None
        return self.engine.submodels_per_chunk(*self.input_ids.shape, own_outputs=own_outputs)

    @cached_property
    def divergence_measure(self) -> Divergence:
        """Measures the divergence from the parent, which runs over the text once."""
        return Divergence(self._nll, self.engine.parent_reference(self.input_ids))

    def chunks(self, keep: Tensor) -> list[Chunk]:
        """Sub-models that will be compared, in chunks of `submodels_per_chunk`.

        All chunks share the route that is fastest for `keep` on average. Scores of different routes
        differ by rounding, and in 16 bits some sub-models differ by less.

        Args:
            keep: bool [S, P].
        Raises:
            TypeError, ValueError: wrong dtype or shape, of masks or of `output_weights` given as
                tensors, or the memory budget is too small for one sequence.
        """
        self._layout.check_mask(keep, dims=2)
        outputs = self._outputs(keep)
        route = self.engine.route_for(keep, *self.input_ids.shape)
        size = self.submodels_per_chunk
        parts = zip(keep.split(size), torch.arange(len(keep)).split(size), strict=True)
        return [
            Chunk(self, part, route, None if outputs is None else outputs.rows(rows))
            for part, rows in parts
        ]

    def whole(self, keep: Tensor) -> Chunk:
        """All of these sub-models as one chunk; arguments and errors as for `chunks`."""
        self._layout.check_mask(keep, dims=2)
        return Chunk(self, keep, None, self._outputs(keep))

    def _outputs(self, keep: Tensor) -> SubmodelOutputs | None:
        if self.output_weights is None:
            return None
        return submodel_outputs(self.output_weights, self._layout, len(keep))


@dataclass(frozen=True, eq=False)
class Chunk:
    """Sub-models that are scored in one call.

    Attributes:
        session: the text.
        keep: bool [n, P].
        route: shared with other chunks; None: the fastest for these sub-models.
        outputs: their own output projections; None: all have the parent's.
    """

    session: ScoringSession
    keep: Tensor
    route: Route | None
    outputs: SubmodelOutputs | None

    def losses(self, progress: Progress | None = None) -> Tensor:
        """Loss of every sub-model on every sequence.

        Args:
            progress: called now and then with the number of pairs done since the last call.
        Returns:
            float32 [n, B] on the CPU, nats per predicted token.
        """
        return self._score(self.session.loss_measure, progress)

    def divergence(self, progress: Progress | None = None) -> Tensor:
        """KL divergence of every sub-model from the parent on every sequence; as `losses`."""
        return self._score(self.session.divergence_measure, progress)

    def _score(self, measure: Measure, progress: Progress | None) -> Tensor:
        session = self.session
        return session.engine.score(
            self.keep,
            session.input_ids,
            measure,
            outputs=self.outputs,
            route=self.route,
            progress=progress,
        )
