"""Sub-models with their own output projections, and the slow truth about them."""

from __future__ import annotations

import copy
import zlib
from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from bonsai_fast.models import Block
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import OutputProjection
from bonsai_fast.surgery import remove_units


class Refit:
    """Other weights and biases for every mask of every sub-layer; counts what was made.

    Args:
        model: the parent.
        skip: the parent's own projection in this layer.
    """

    def __init__(self, model: PreTrainedModel, *, skip: int | None = None) -> None:
        modules = dict(model.named_modules())
        self._outputs = {
            block.output: (
                modules[block.output].weight.detach().float().clone(),
                modules[block.output].bias,
            )
            for block in Layout.of(model).decoder.blocks()
        }
        self._skip = skip
        self.made: Counter[tuple[str, bytes]] = Counter()

    def __call__(self, block: Block, keep_parts: Tensor) -> OutputProjection | None:
        assert keep_parts.device.type == "cpu" and not keep_parts.all()
        mask = keep_parts.numpy().tobytes()
        self.made[block.output, mask] += 1
        if block.layer == self._skip:
            return None
        weight, bias = self._outputs[block.output]
        kept = weight[:, keep_parts.repeat_interleave(block.part_width)]
        generator = torch.Generator().manual_seed(zlib.crc32(block.output.encode() + mask))
        noise = torch.randn(kept.shape, generator=generator)
        if bias is not None:
            bias = bias.detach().float() + 0.3 * torch.randn(bias.shape, generator=generator)
        return OutputProjection(0.7 * kept + 0.1 * noise, bias)


@torch.no_grad()
def compensated(
    model: PreTrainedModel, layout: Layout, keep: Tensor, refit: Refit
) -> PreTrainedModel:
    """The smaller model, cut from a parent with the sub-model's output projections."""
    parent = copy.deepcopy(model)
    for block, kept in layout.keep_by_block(keep):
        made = None if bool(kept.all()) else refit(block, kept)
        if made is not None:
            output = parent.get_submodule(block.output)
            output.weight[:, kept.repeat_interleave(block.part_width)] = made.weight.to(
                output.weight
            )
            if made.bias is not None:
                output.bias.copy_(made.bias)
    return remove_units(parent, layout, keep)


@torch.no_grad()
def losses_of_compensated(
    model: PreTrainedModel, layout: Layout, masks: Tensor, refit: Refit, input_ids: Tensor
) -> Tensor:
    """Loss of each smaller model's own logits: float32 [S, B]."""
    found = []
    for keep in masks:
        smaller = compensated(model, layout, keep, refit)
        logits = smaller(input_ids=input_ids).logits.float()[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
        found.append(losses.mean(dim=1))
    return torch.stack(found)
