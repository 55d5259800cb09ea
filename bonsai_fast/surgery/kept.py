"""What every layer and every parameter keeps, by a keep mask over units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from bonsai_fast.hub import LayerShape
from bonsai_fast.models import AttentionBlock, Block, ExpertsBlock, MLPBlock, family_of
from bonsai_fast.models.experts import CHANNEL_MULTIPLE
from bonsai_fast.models.layout import Layout

# Families whose position information (ALiBi) depends on the number of a head.
ALIBI_FAMILIES = frozenset({"bloom"})
# what lists of kept positions call the parts of a sub-layer
POSITIONS: dict[type[Block], str] = {
    AttentionBlock: "heads",
    MLPBlock: "channels",
    ExpertsBlock: "experts",
}


@dataclass(frozen=True)
class Kept:
    """The kept part of a parent.

    Attributes:
        shapes: what each decoder layer keeps.
        experts, expert_channels: how many experts, or channels in each of them, a mixture keeps, by
            layer; 0 if it is removed, none if they are no units.
        slices: for every parameter or buffer that loses a part: (dim, int64 index of what is
            kept).
        removed: prefixes of the parameters that are removed as a whole.
        spared: parameters with such a prefix that are kept.
    """

    shapes: tuple[LayerShape, ...]
    experts: dict[int, int]
    expert_channels: dict[int, int]
    slices: dict[str, tuple[int, torch.Tensor]]
    removed: tuple[str, ...]
    spared: frozenset[str]

    def keeps(self, name: str) -> bool:
        """Whether any part of a parameter is kept."""
        return name in self.spared or not name.startswith(self.removed)

    def shape_of(self, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
        """Shape of the kept part of a parameter."""
        shape = list(parameter.shape)
        if name in self.slices:
            dim, index = self.slices[name]
            shape[dim] = len(index)
        return tuple(shape)


def kept_by(model: PreTrainedModel, layout: Layout, keep_mask: torch.Tensor) -> Kept:
    """What is kept of `model`, the model of `layout`; `keep_mask` is bool [P] on the CPU.

    Raises:
        ValueError: a number of channels inside experts that these cannot have.
    """
    shapes = [LayerShape((), 0) for _ in range(layout.decoder.num_layers)]
    experts: dict[int, int] = {}
    expert_channels: dict[int, int] = {}
    slices: dict[str, tuple[int, torch.Tensor]] = {}
    removed: list[str] = []
    spared: list[str] = []
    for block, keep_parts in layout.keep_by_block(keep_mask):
        if isinstance(block, ExpertsBlock):
            counts = experts if block.unit == "expert" else expert_channels
            counts[block.layer] = count = int(keep_parts.sum())
            is_cut = 0 < count < len(keep_parts)
            if block.unit == "channel" and is_cut and count % CHANNEL_MULTIPLE:
                raise ValueError(
                    f"layer {block.layer}: expected a multiple of {CHANNEL_MULTIPLE} channels in "
                    f"each expert, which PyTorch's grouped products need, got {count}"
                )
        if not bool(keep_parts.any()):
            paths = (*block.modules, *block.norms)
            removed += [f"{path}." for path in paths]
            spared.append(f"{block.output}.bias")
            continue
        if isinstance(block, AttentionBlock):
            shapes[block.layer] = replace(
                shapes[block.layer], **_kept_heads(model, block, keep_parts)
            )
        elif isinstance(block, MLPBlock):
            shapes[block.layer] = replace(shapes[block.layer], channels=int(keep_parts.sum()))
        if not bool(keep_parts.all()):
            kept_parts = block.kept_parts(keep_parts)
            cuts = block.cuts
            if isinstance(block, ExpertsBlock) and block.unit == "expert":
                cuts += block.buffers
            for cut in cuts:
                slices[cut.parameter] = (cut.dim, kept_parts[cut.owner].nonzero().flatten())
    return Kept(tuple(shapes), experts, expert_channels, slices, tuple(removed), frozenset(spared))


def _kept_heads(
    model: PreTrainedModel, block: AttentionBlock, keep_heads: torch.Tensor
) -> dict[str, Any]:
    """The fields of a `LayerShape` for an attention that keeps some of its query heads."""
    heads = keep_heads.nonzero().flatten().tolist()
    readers = torch.tensor(block.kv_of_head)[keep_heads].bincount(minlength=block.num_kv_heads)
    change: dict[str, Any] = {"q_heads_per_kv": tuple(readers[readers > 0].tolist())}
    if family_of(model.config.model_type) in ALIBI_FAMILIES:
        numbers = getattr(model.get_submodule(block.module), "alibi_heads", None)
        if numbers is not None or len(heads) < block.num_heads:
            numbers = numbers or range(block.num_heads)
            change["alibi_heads"] = tuple(numbers[head] for head in heads)
    return change


def kept_positions(layout: Layout, keep_mask: torch.Tensor) -> list[dict[str, list[int]]]:
    """List the query heads, channels and experts that every layer keeps, by the parent's numbers.

    Args:
        layout: units of the parent.
        keep_mask: bool [P].
    Returns:
        for each layer `{"heads": [...], "channels": [...]}`, ready for JSON; an empty list if the
        sub-layer is removed. A mixture of experts has "experts" too.
    Raises:
        TypeError, ValueError: the mask is not bool, or not [P].
    """
    layout.check_mask(keep_mask, dims=1)
    layers: list[dict[str, list[int]]] = [
        {"heads": [], "channels": []} for _ in range(layout.decoder.num_layers)
    ]
    for block, keep_parts in layout.keep_by_block(keep_mask.cpu()):
        kind = POSITIONS[type(block)]
        if isinstance(block, ExpertsBlock) and block.unit == "channel":
            kind = "channels"
        layers[block.layer][kind] = keep_parts.nonzero().flatten().tolist()
    return layers
