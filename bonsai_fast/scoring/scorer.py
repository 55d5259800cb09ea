"""MaskScorer: keep masks and text in, a loss for each (sub-model, sequence) pair out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.memory import default_budget, parse_bytes
from bonsai_fast.config.choices import EngineName, Precision, Route
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused import FusedEngine, UnsupportedStructureError
from bonsai_fast.scoring.hooks_engine import HooksEngine
from bonsai_fast.scoring.interface import Engine, Progress
from bonsai_fast.scoring.output_weights import OutputTensors, OutputWeights
from bonsai_fast.scoring.scoring_session import ScoringSession
from bonsai_fast.scoring.sequence_nll import SequenceNLL
from bonsai_fast.scoring.working_set import logit_bytes_within


class MaskScorer:
    """Scores sub-models of one parent without instantiating any of them.

    A sub-model is the parent with the removed units' contribution zeroed at the input of the output
    projection. That computes the same function as the parent with their rows and columns cut out.

    Args:
        model: the parent, a causal language model, loaded, or streamed by `open_streamed` or
            `stream_layers`. Dropout is off while scoring, also if the model is in training mode.
        layout: its units; `Layout.of(model)` if None.
        engine: "hooks" runs the model itself and works for every supported family; "fused" supports
            the decoders that `scoring/fused` can read (LLaMA, Mistral, Qwen, Phi, Gemma, Granite,
            SmolLM3, Cohere, OLMo and others), runs them layer by layer over all sub-models, and
            computes what sub-models share once; "auto" is "fused" where the model is supported.
        route: how the fused engine computes sub-layers with removed parts.
            "dense": the whole sub-layer, then what is removed is set to zero.
            "slice": on a copy of the weights that a sub-model keeps.
            "gather": kernels that read each sub-model's kept weights in place.
            "pack": one copy per wave of the weights that any sub-model of the call keeps, then as
            "dense".
            "tail": as "pack", but each MLP on a slice of that copy for each sub-model.
            "split": as "pack", but each MLP in two parts: one product for the channels that all
            sub-models keep; "gather" kernels for the others.
            "auto": the fastest by measured speeds on a GPU, by a fixed table on a CPU; never
            "split", which no GPU has measured yet.
        precision: of the matrix products in layers. "full" is the model's own; "int8" (CPU, or CUDA
            from compute capability 8.0) and "fp8" (CUDA from 8.9) use 8 bits with a scale for each
            token and each output. Both need the fused engine; see `check_precision`. The channels
            that route "split" gathers stay in full precision.
        memory_budget: bytes (or "2GiB") that scoring may use beside the weights; None: 2 GiB on a
            CPU, half of the device's memory on CUDA. A streamed model is read once per batch, and
            the budget limits the batch: give it all memory that is free.
    Attributes:
        engine: what computes the scores.
        why_hooks: what the fused engine does not support in this model; "" if that was not tried.
    Raises:
        ValueError: unknown engine, route or precision, or the model cannot be scored with these.
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
            raise ValueError(f"route gather supports precision full only, got {precision}")
        self.model, self.precision = model, precision
        self.layout = layout if layout is not None else Layout.of(model)
        self.memory_budget = (
            default_budget(model.device) if memory_budget is None else parse_bytes(memory_budget)
        )
        self._nll = SequenceNLL(model, logit_bytes=logit_bytes_within(self.memory_budget))
        self.why_hooks = ""
        self.engine = self._make_engine(engine, route)

    def __repr__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        precision = "" if self.precision == "full" else f", products in {self.precision}"
        return (
            f"MaskScorer({type(self.model).__name__}, {len(self.layout):,} units, "
            f"engine {self.engine.name}, {dtype} on {self.device}{precision}, "
            f"memory budget {self.memory_budget / 2**20:,.0f} MiB)"
        )

    @property
    def device(self) -> torch.device:
        """Device of the model's LM head; masks and tokens are moved there."""
        return self._nll.head.weight.device

    def rows_per_batch(self, length: int) -> int:
        """Number of (sub-model, sequence) pairs processed at once, for `length` tokens each."""
        return self.engine.rows_per_batch(length)

    def record_rates(self, path: Path, *, write: bool) -> None:
        """Choose routes by the GPU speeds in a file, as another start of the same run did.

        Without the file, the speeds measured on this GPU are used. On a CPU nothing is measured.

        Args:
            path: JSON.
            write: whether to write measured speeds to the file.
        Raises:
            ValueError: the file holds something else.
        """
        if isinstance(self.engine, FusedEngine):
            self.engine.record_rates(path, write=write)

    def session(
        self,
        input_ids: torch.Tensor,
        *,
        output_weights: OutputWeights | OutputTensors | None = None,
    ) -> ScoringSession:
        """Score many sub-models on one text, in chunks that can be recorded one by one.

        Args:
            input_ids: int64 [B, T], T >= 2, no padding.
            output_weights: as for `score`; tensors have a row for each of the sub-models that are
                given to the session together.
        Raises:
            TypeError, ValueError: wrong dtype or shape, token ids outside the vocabulary, or a
                route that does not support `output_weights`.
        """
        self._check_tokens(input_ids)
        if output_weights is not None:
            self.engine.check_own_outputs()
        return ScoringSession(self.engine, self.layout, self._nll, input_ids, output_weights)

    def score(
        self,
        keep: torch.Tensor,
        input_ids: torch.Tensor,
        *,
        output_weights: OutputWeights | OutputTensors | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Loss of every sub-model on every sequence.

        With `output_weights`, sub-models are scored as compensated: each one's loss is that of the
        parent whose output projections were exchanged for the sub-model's and whose removed units
        were cut out. Any engine, and any route but "split", supports it.

        Args:
            keep: bool [S, P], True = kept.
            input_ids: int64 [B, T], T >= 2, no padding.
            output_weights: the sub-models' own output projections; None: all have the parent's.
                A function makes them from the mask of a sub-layer; see `OutputWeights`. It is
                called when the layer is computed, and a few results are held at once, within the
                memory budget. What the function itself holds is not counted.
                Or tensors, by the names of the parent's parameters: weights [S, D, in_features] of
                some output projections, for every sub-model; columns of removed units are not read.
                A bias [S, D] beside it replaces or adds the bias. Such sub-models share no hidden
                states after the first of these layers.
            progress: called now and then with the number of pairs done since the last call.
        Returns:
            float32 [S, B] on the CPU, mean nats per predicted token. A sub-model that overflows has
            NaN or Inf in its own row only.
        Raises:
            TypeError, ValueError: wrong dtype or shape, token ids outside the vocabulary, a route
                that does not support `output_weights`, or the memory budget is too small for one
                sequence.
        """
        session = self.session(input_ids, output_weights=output_weights)
        return session.whole(keep).losses(progress)

    def divergence(
        self,
        keep: torch.Tensor,
        input_ids: torch.Tensor,
        *,
        output_weights: OutputWeights | OutputTensors | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """KL divergence of every sub-model from the parent, on every sequence.

        It says more than a loss where text is scarce: it counts every change of the predictions,
        also one that happens to help on these tokens. The parent runs once per call; a `session`
        runs it once per text. A model that caps its logits needs the parent's logits again for
        every sub-model.

        Args:
            keep, input_ids, output_weights, progress: as for `score`.
        Returns:
            float32 [S, B] on the CPU, mean nats per predicted token.
        Raises:
            TypeError, ValueError: as `score`.
        """
        session = self.session(input_ids, output_weights=output_weights)
        return session.whole(keep).divergence(progress)

    def as_function(
        self, input_ids: torch.Tensor, *, output_weights: OutputWeights | None = None
    ) -> Callable[[np.ndarray], np.ndarray]:
        """The scorer as a plain function, for shap, scipy, optuna, pymoo or your own search.

        Args:
            input_ids: int64 [B, T].
            output_weights: as for `score`, a function.
        Returns:
            a function of keep masks (bool or 0/1 array [S, P], or [P] for one) to float64 [S]: the
            mean loss over all sequences, nats per predicted token.
        """
        session = self.session(input_ids, output_weights=output_weights)

        def mean_loss(keep: np.ndarray) -> np.ndarray:
            masks = np.atleast_2d(np.asarray(keep))
            if masks.dtype != np.bool_:
                if not np.isin(masks, (0, 1)).all():
                    raise ValueError("keep masks: expected only 0 and 1 (1 = kept)")
                masks = masks.astype(np.bool_)
            losses = session.whole(torch.from_numpy(np.ascontiguousarray(masks))).losses()
            return losses.mean(dim=1, dtype=torch.float64).numpy()

        return mean_loss

    def _make_engine(self, engine: EngineName, route: Route) -> Engine:
        if engine != "hooks":
            try:
                return FusedEngine(
                    self.layout, self._nll, self.memory_budget, route, self.precision
                )
            except UnsupportedStructureError as error:
                name = type(self.model).__name__
                if engine == "fused" or self.precision != "full":
                    raise ValueError(
                        f"the fused engine does not support {name}: {error}"
                    ) from error
                if route != "auto":
                    raise ValueError(
                        f"route: routes exist only in the fused engine, which does not support "
                        f"{name}; omit route {route}"
                    ) from error
                self.why_hooks = str(error)
        elif self.precision != "full":
            raise ValueError(f"engine hooks supports precision full only, got {self.precision}")
        elif route != "auto":
            raise ValueError(f"route: routes exist only in the fused engine; omit route {route}")
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
