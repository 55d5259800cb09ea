"""Scoring sub-models without this package: hooks multiply masks in, HF computes all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Layout


@contextmanager
def multiplied(model: PreTrainedModel, layout: Layout, keep: Tensor) -> Iterator[None]:
    """Apply each sub-model's mask to its rows; a batch holds the rows of all, one after another.

    Args:
        model: the parent.
        layout: its units.
        keep: bool [S, P].
    """
    handles = []
    for block, kept in layout.keep_by_block(keep.to(model.device)):
        width = block.head_dim if isinstance(block, AttentionBlock) else 1
        projection = model.get_submodule(block.output)
        # [S, 1, 1, columns]: all rows and tokens of a sub-model have its mask
        factor = kept.repeat_interleave(width, dim=1)[:, None, None].to(projection.weight.dtype)

        def multiply(
            _: nn.Module, inputs: tuple[Tensor, ...], factor: Tensor = factor
        ) -> tuple[Tensor]:
            return ((inputs[0].unflatten(0, (len(factor), -1)) * factor).flatten(0, 1),)

        handles.append(projection.register_forward_pre_hook(multiply))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def token_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Negative log-likelihood of each predicted token in nats, from all logits in float32.

    Args:
        model: any causal language model.
        input_ids: int64 [B, T].
    Returns:
        float32 [B, T - 1].
    """
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    labels = input_ids[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels)
