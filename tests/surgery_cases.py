"""What the tests of surgery and of saving share: hard masks, and the slow truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from families import FAMILIES
from transformers import PreTrainedModel

from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import remove_units

TOLERANCE = 1e-4  # fp32: a narrower matrix product sums in another order

Mask = Callable[[Layout], torch.Tensor]


def _random(share: float, seed: int) -> Mask:
    def mask(layout: Layout) -> torch.Tensor:
        return torch.rand(len(layout), generator=torch.Generator().manual_seed(seed)) < share

    return mask


def _without(mask: Mask, *gone: tuple[int, type]) -> Mask:
    """Also drop these (layer, kind of block)."""

    def result(layout: Layout) -> torch.Tensor:
        keep = mask(layout)
        for group in layout.groups:
            if any(group.layer == layer and isinstance(group.block, kind) for layer, kind in gone):
                keep[group.start : group.stop] = False
        return keep

    return result


def without_attention(*layers: int) -> Mask:
    """Most units, but no attention in these layers."""
    return _without(_random(0.7, seed=1), *((layer, AttentionBlock) for layer in layers))


def irregular(layout: Layout) -> torch.Tensor:
    """The first query head of every layer goes: the first KV head has fewer readers."""
    gone = [
        unit.index == 0 if unit.kind == "head" else (unit.index + unit.layer) % 3 == 0
        for unit in layout
    ]
    return ~torch.tensor(gone)


MASKS: dict[str, Mask] = {
    "irregular": irregular,
    "half": _random(0.5, seed=2),
    "most": _random(0.8, seed=3),
    "few": _random(0.1, seed=4),
    "first attention gone": without_attention(0),
    "middle layer gone": _without(_random(0.7, seed=5), (1, object)),
    "all attention gone": without_attention(0, 1, 2),
    "everything gone": _random(0.0, seed=0),
}


@contextmanager
def masked(model: PreTrainedModel, layout: Layout, keep: torch.Tensor) -> Iterator[PreTrainedModel]:
    """While this holds, removed units contribute zero at the input of the output projections."""
    handles = []
    for block, keep_parts in layout.keep_by_block(keep):
        width = block.head_dim if isinstance(block, AttentionBlock) else 1
        keep_columns = keep_parts.repeat_interleave(width)

        def zero(
            module: torch.nn.Module, args: tuple[torch.Tensor], kept: torch.Tensor = keep_columns
        ) -> tuple[torch.Tensor]:
            return (torch.where(kept, args[0], 0.0),)

        projection = model.get_submodule(block.output)
        handles.append(projection.register_forward_pre_hook(zero))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """int64 [B, T] without special tokens."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: PreTrainedModel, *args: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return model(*args, **kwargs).logits


def masked_logits(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    with masked(model, layout, keep):
        return logits_of(model, input_ids)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference; NaN is infinitely far from anything."""
    return (actual.float() - expected.float()).abs().nan_to_num(float("inf")).max().item()


def pruned(family: str, mask: str = "half") -> PreTrainedModel:
    """A tiny model of a family, cut by one of these masks."""
    model = FAMILIES[family]()
    layout = Layout.of(model)
    return remove_units(model, layout, MASKS[mask](layout))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()
