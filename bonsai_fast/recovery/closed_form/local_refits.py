"""Output projections of sub-models, each refitted for what its sub-layer keeps."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import weight
from bonsai_fast.models import Block
from bonsai_fast.recovery.closed_form.output_grams import OutputGrams
from bonsai_fast.scoring import OutputProjection


class LocalRefits:
    """Refits an output projection on the parent's own states: an `OutputWeights`.

        W_K += W_R A_RK (A_KK + ridge mean(diag A) I)^-1

    The result depends on the sub-layer's mask alone, so sub-models share hidden states as usual. A
    saved model is refitted on its own states instead, and is better for it.

    Args:
        model: the parent, in memory or streamed.
        grams: of the inputs of its output projections.
        ridge: as a multiple of the mean of the diagonal.
            Solved in float32, so not below 0.01.
        cache_bytes: limit for projections that are kept for other sub-models.
    """

    def __init__(
        self, model: PreTrainedModel, grams: OutputGrams, *, ridge: float, cache_bytes: int
    ) -> None:
        self._model, self._grams = model, grams
        self._ridge, self._cache_bytes = ridge, cache_bytes
        self._cache: OrderedDict[tuple[str, bytes], OutputProjection] = OrderedDict()
        self._cached_bytes = 0

    def __call__(self, block: Block, keep_parts: Tensor) -> OutputProjection:
        """See `OutputWeights`."""
        key = (block.output, keep_parts.numpy().tobytes())
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        found = self._cache[key] = self._refit(block, keep_parts)
        self._cached_bytes += _bytes_of(found)
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= _bytes_of(self._cache.popitem(last=False)[1])
        return found

    def _refit(self, block: Block, keep_parts: Tensor) -> OutputProjection:
        own = weight(self._model, f"{block.output}.weight").detach()
        moments = self._grams.of(block)
        gram, mean = (x.to(own.device) for x in (moments.gram, moments.mean))
        keep = keep_parts.repeat_interleave(block.part_width).to(own.device)
        kept, gone = own[:, keep].float(), own[:, ~keep].float()
        damped = gram[keep][:, keep]
        damped.diagonal().add_(self._ridge * (float(gram.diagonal().mean()) or 1.0))
        lower = torch.linalg.cholesky(damped)
        change = torch.cholesky_solve(gram[keep][:, ~keep] @ gone.T, lower).T
        bias = getattr(self._model.get_submodule(block.output), "bias", None)
        if bias is not None:
            lost = gone @ mean[~keep] - change @ mean[keep]
            bias = (bias.detach().float() + lost).to(own.dtype)
        return OutputProjection((kept + change).to(own.dtype), bias)


def _bytes_of(projection: OutputProjection) -> int:
    return projection.weight.numel() * projection.weight.element_size()
