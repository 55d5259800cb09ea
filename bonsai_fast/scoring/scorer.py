"""MaskScorer: many sub-models and some text in, a loss for each pair out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from bonsai_fast.scoring.hooks import HooksEngine
from bonsai_fast.scoring.memory import (
    default_budget,
    logit_bytes_within,
    parse_bytes,
    rows_within,
)
from bonsai_fast.scoring.nll import ParentReference, SequenceNLL, evaluation_mode
from bonsai_fast.units import Layout

EngineName = Literal["auto", "hooks"]
Progress = Callable[[int], None]


class MaskScorer:
    """Scores sub-models of one parent without instantiating any of them.

    A sub-model is the parent with the removed units' contribution zeroed at the input of the output
    projection, which is the same function as the parent with their rows and columns cut out.

    Args:
        model: the parent, a causal language model in evaluation mode or not (dropout is off while
            scoring).
        layout: its units; `Layout.of(model)` if None.
        engine: "hooks" runs the model as it is and works for every supported family; "auto" picks
            the best engine.
        memory_budget: bytes (or "2GiB") that scoring may use beside the weights; None: 2 GiB on a
            CPU, half of the device's memory on CUDA.
    Raises:
        ValueError: unknown engine, or the model cannot be scored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layout: Layout | None = None,
        engine: EngineName = "auto",
        memory_budget: int | str | None = None,
    ) -> None:
        if engine not in get_args(EngineName):
            raise ValueError(f"engine: expected one of {get_args(EngineName)}, got {engine!r}")
        self.model = model
        self.layout = layout if layout is not None else Layout.of(model)
        self.memory_budget = (
            default_budget(model.device) if memory_budget is None else parse_bytes(memory_budget)
        )
        self._nll = SequenceNLL(model, logit_bytes=logit_bytes_within(self.memory_budget))
        self.engine = HooksEngine(self.layout, self._nll)

    @property
    def device(self) -> torch.device:
        """Where the model's LM head lies; masks and tokens are moved there."""
        return self._nll.head.weight.device

    def rows_per_batch(self, length: int) -> int:
        """(sub-model, sequence) pairs that are scored at once, for sequences of `length` tokens."""
        return rows_within(self.memory_budget, self.layout, self._nll, length)

    def score(
        self, keep: torch.Tensor, input_ids: torch.Tensor, *, progress: Progress | None = None
    ) -> torch.Tensor:
        """Loss of every sub-model on every sequence.

        Args:
            keep: bool [S, P], True = kept.
            input_ids: int64 [B, T], T >= 2, no padding.
            progress: called with the number of pairs done after every batch.
        Returns:
            float32 [S, B] on the CPU, mean nats per predicted token. A sub-model that overflows has
            NaN or Inf in its own row only.
        Raises:
            TypeError, ValueError: wrong dtype or shape, or token ids outside the vocabulary.
        """
        self._check_tokens(input_ids)
        return self._over_pairs(keep, input_ids, None, progress)

    @property
    def measures_divergence(self) -> bool:
        """Whether `divergence` works for this model: its logits are linear in its hidden states."""
        return self._nll.is_linear

    def parent_reference(self, input_ids: torch.Tensor) -> ParentReference:
        """What `divergence` compares with, for int64 [B, T]; made once, kept on the CPU."""
        self._check_tokens(input_ids)
        step = self.rows_per_batch(input_ids.shape[1])
        with evaluation_mode(self.model):
            parts = [self._nll.parent(rows.to(self.device)) for rows in input_ids.split(step)]
        return ParentReference(
            torch.cat([part.mean_weight.cpu() for part in parts]),
            torch.cat([part.constant.cpu() for part in parts]),
        )

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
        return self._over_pairs(keep, input_ids, parent, progress)

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

    def _over_pairs(
        self,
        keep: torch.Tensor,
        input_ids: torch.Tensor,
        parent: ParentReference | None,
        progress: Progress | None,
    ) -> torch.Tensor:
        """Score all pairs of sub-model and sequence, batch by batch."""
        self.layout.check_mask(keep, dims=2)
        sequences = len(input_ids)
        found = torch.empty(len(keep) * sequences, dtype=torch.float32)
        for start, stop in self._batches(len(found), input_ids.shape[1]):
            pairs = torch.arange(start, stop)
            text = pairs % sequences
            reference = None if parent is None else parent.rows(text).to(self.device)
            with evaluation_mode(self.model):
                found[start:stop] = self.engine.score_rows(
                    keep[pairs // sequences].to(self.device),
                    input_ids[text].to(self.device),
                    reference,
                ).cpu()
            if progress is not None:
                progress(stop - start)
        return found.view(len(keep), sequences)

    def _batches(self, pairs: int, length: int) -> Iterator[tuple[int, int]]:
        step = self.rows_per_batch(length)
        for start in range(0, pairs, step):
            yield start, min(start + step, pairs)

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
