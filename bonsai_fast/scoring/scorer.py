"""MaskScorer: many sub-models and some text in, a loss for each pair out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.memory import default_budget, parse_bytes
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused import (
    FusedEngine,
    Precision,
    Rates,
    Route,
    UnsupportedStructureError,
)
from bonsai_fast.scoring.hooks_engine import HooksEngine
from bonsai_fast.scoring.interface import Engine, Progress
from bonsai_fast.scoring.sequence_nll import ParentReference, SequenceNLL
from bonsai_fast.scoring.working_set import logit_bytes_within

EngineName = Literal["auto", "hooks", "fused"]


class MaskScorer:
    """Scores sub-models of one parent without instantiating any of them.

    A sub-model is the parent with the removed units' contribution zeroed at the input of the output
    projection, which is the same function as the parent with their rows and columns cut out.

    Args:
        model: the parent, a causal language model in evaluation mode or not (dropout is off while
            scoring); loaded, or streamed by `open_streamed` or `stream_layers`.
        layout: its units; `Layout.of(model)` if None.
        engine: "hooks" runs the model as it is and works for every supported family; "fused" runs
            LLaMA-like decoders layer by layer over all sub-models, and what sub-models share once;
            "auto" is "fused" where that is possible.
        route: how the fused engine computes masked sub-layers: "dense" whole, with what is removed
            set to zero, "slice" from copies of what is kept, "gather" by kernels that read what
            each sub-model keeps where it lies, "pack" from one copy a wave of what any sub-model of
            the call keeps, "tail" so, too, but of MLPs each sub-model's slice of it, "split" so,
            too, but of MLPs one product for what all keep, and what else each sub-model keeps by
            kernels that read it where it lies; "auto" decides by what costs less, though never for
            "split", which no GPU has measured yet.
        precision: of the products in layers: "full" is the model's own, "int8" (CPU, or CUDA from
            compute capability 8.0 on) and "fp8" (CUDA from 8.9 on) have 8 bits and a scale for each
            token and each output, and need the fused engine; see `check_precision`. What "split"
            gathers stays in full precision.
        memory_budget: bytes (or "2GiB") that scoring may use beside the weights; None: 2 GiB on a
            CPU, half of the device's memory on CUDA. Of a streamed model, whose layers are read
            once for as many tokens as it allows, give it what can be spared.
    Raises:
        ValueError: unknown engine or route, or the model cannot be scored, or not by that engine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layout: Layout | None = None,
        engine: EngineName = "auto",
        route: Route = "auto",
        precision: Precision = "full",
        memory_budget: int | str | None = None,
    ) -> None:
        if engine not in get_args(EngineName):
            raise ValueError(f"engine: expected one of {get_args(EngineName)}, got {engine!r}")
        if route not in get_args(Route):
            raise ValueError(f"route: expected one of {get_args(Route)}, got {route!r}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision: expected one of {get_args(Precision)}, got {precision!r}")
        if precision != "full" and route == "gather":
            raise ValueError(f"precision {precision}: route gather has full precision only")
        self.model, self.precision = model, precision
        self.layout = layout if layout is not None else Layout.of(model)
        self.memory_budget = (
            default_budget(model.device) if memory_budget is None else parse_bytes(memory_budget)
        )
        self._nll = SequenceNLL(model, logit_bytes=logit_bytes_within(self.memory_budget))
        self.engine = self._make_engine(engine, route)

    @property
    def device(self) -> torch.device:
        """Where the model's LM head lies; masks and tokens are moved there."""
        return self._nll.head.weight.device

    def rows_per_batch(self, length: int) -> int:
        """(sub-model, sequence) pairs that are scored at once, for sequences of `length` tokens."""
        return self.engine.rows_per_batch(length)

    def submodels_per_call(self, sequences: int, length: int) -> int:
        """Sub-models that should be scored in one call where each call's result is recorded.

        Fewer would compute twice what sub-models have in common; more would only be lost together.
        """
        return self.engine.submodels_per_call(sequences, length)

    @property
    def rates(self) -> dict[str, float] | None:
        """Speeds of the GPU by which routes are chosen, measured once; None where a table does.

        What was measured before can be set, so that scores come out as they did then. A ValueError
        says that it was something else.
        """
        rates = self.engine.rates if isinstance(self.engine, FusedEngine) else None
        return None if rates is None else asdict(rates)

    @rates.setter
    def rates(self, rates: dict[str, float]) -> None:
        if isinstance(self.engine, FusedEngine):
            self.engine.rates = Rates.read(rates)

    def one_route(
        self, keep: torch.Tensor, input_ids: torch.Tensor
    ) -> AbstractContextManager[None]:
        """While this holds, sub-models are scored by the one route that suits these on average.

        Scores of different routes differ by rounding, which in 16 bits is more than some sub-models
        differ by: what is to be compared should share a route. On a GPU "auto" otherwise decides
        for each call of `score` by itself; on a CPU each mask has its route by a fixed table.

        Args:
            keep: bool [S, P].
            input_ids: int64 [B, T].
        """
        self.layout.check_mask(keep, dims=2)
        return self.engine.one_route(keep, *input_ids.shape)

    def score(
        self, keep: torch.Tensor, input_ids: torch.Tensor, *, progress: Progress | None = None
    ) -> torch.Tensor:
        """Loss of every sub-model on every sequence.

        Args:
            keep: bool [S, P], True = kept.
            input_ids: int64 [B, T], T >= 2, no padding.
            progress: called with the number of pairs done, every now and then.
        Returns:
            float32 [S, B] on the CPU, mean nats per predicted token. A sub-model that overflows has
            NaN or Inf in its own row only.
        Raises:
            TypeError, ValueError: wrong dtype or shape, or token ids outside the vocabulary.
        """
        self._check_tokens(input_ids)
        self.layout.check_mask(keep, dims=2)
        return self.engine.score(keep, input_ids, None, progress)

    @property
    def measures_divergence(self) -> bool:
        """Whether `divergence` works for this model: its logits are linear in its hidden states."""
        return self._nll.is_linear

    def parent_reference(self, input_ids: torch.Tensor) -> ParentReference:
        """What `divergence` compares with, for int64 [B, T]; made once, kept on the CPU."""
        self._check_tokens(input_ids)
        return self.engine.parent(input_ids)

    def divergence(
        self,
        keep: torch.Tensor,
        input_ids: torch.Tensor,
        parent: ParentReference,
        *,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """KL divergence of every sub-model from the parent, on every sequence.

        Says more than a loss where text is scarce: it counts every change of the predictions, also
        one that happens to help on these tokens.

        Args:
            keep: bool [S, P], True = kept.
            input_ids: int64 [B, T], T >= 2, no padding.
            parent: `parent_reference(input_ids)`.
        Returns:
            float32 [S, B] on the CPU, mean nats per predicted token.
        Raises:
            TypeError, ValueError: as `score`, or the model caps its logits.
        """
        self._check_tokens(input_ids)
        if len(parent.constant) != len(input_ids):
            raise ValueError(
                f"parent: expected a reference for {len(input_ids)} sequences, "
                f"got one for {len(parent.constant)}"
            )
        self.layout.check_mask(keep, dims=2)
        return self.engine.score(keep, input_ids, parent, progress)

    def as_function(self, input_ids: torch.Tensor) -> Callable[[np.ndarray], np.ndarray]:
        """The scorer as a plain function, for shap, scipy, optuna, pymoo or a search of your own.

        Args:
            input_ids: int64 [B, T].
        Returns:
            a function of keep masks (bool or 0/1 array [S, P], or [P] for one) to float64 [S]: the
            mean loss over all sequences, nats per predicted token.
        """
        self._check_tokens(input_ids)

        def mean_loss(keep: np.ndarray) -> np.ndarray:
            masks = np.atleast_2d(np.asarray(keep))
            if masks.dtype != np.bool_:
                if not np.isin(masks, (0, 1)).all():
                    raise ValueError("keep masks: expected only 0 and 1 (1 = kept)")
                masks = masks.astype(np.bool_)
            losses = self.score(torch.from_numpy(np.ascontiguousarray(masks)), input_ids)
            return losses.mean(dim=1, dtype=torch.float64).numpy()

        return mean_loss

    def _make_engine(self, engine: EngineName, route: Route) -> Engine:
        if engine != "hooks":
            try:
                return FusedEngine(
                    self.layout, self._nll, self.memory_budget, route, self.precision
                )
            except UnsupportedStructureError as error:
                if engine == "fused" or self.precision != "full":
                    name = type(self.model).__name__
                    raise ValueError(
                        f"{name} cannot be scored by the fused engine: {error}"
                    ) from error
        elif self.precision != "full":
            raise ValueError(f"precision {self.precision}: engine hooks has full precision only")
        return HooksEngine(self.layout, self._nll, self.memory_budget)

    def _check_tokens(self, input_ids: torch.Tensor) -> None:
        if input_ids.dtype != torch.int64:
            raise TypeError(f"input_ids: expected dtype int64, got {input_ids.dtype}")
        if input_ids.dim() != 2 or len(input_ids) == 0 or input_ids.shape[1] < 2:
            raise ValueError(
                f"input_ids: expected shape [B, T] with B >= 1 and T >= 2, "
                f"got {tuple(input_ids.shape)}"
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self._nll.vocab_size:
            raise ValueError(
                f"input_ids: expected token ids in [0, {self._nll.vocab_size}), "
                f"got {low if low < 0 else high}"
            )
