"""The last step of an allocation: a mask that engines run well, at the requested size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from bonsai_fast.config.choices import HeadLayout
from bonsai_fast.methods.allocation.exchange import fill
from bonsai_fast.methods.allocation.parameter_count import drop_empty
from bonsai_fast.methods.allocation.rectangular_heads import make_rectangular
from bonsai_fast.methods.allocation.round_widths import auto_multiple, round_widths
from bonsai_fast.methods.allocation.select import check_within
from bonsai_fast.methods.allocation.uniform import make_uniform
from bonsai_fast.models import AttentionBlock, ExpertsBlock
from bonsai_fast.models.layout import Layout

TOLERANCE = 0.005  # of the budget


@dataclass(frozen=True)
class Achieved:
    """The requested and the achieved size.

    Attributes:
        asked: requested number of decoder parameters to remove.
        removed: number removed, at most that.
        num_parameters: parameters of the pruned model.
        sparsity: removed fraction of the decoder's parameters.
        heads: (query heads, KV heads) kept, by layer.
        widths: channels kept, by layer; 0 where experts are removed as a whole.
        experts: experts kept, by layer; 0 where these are no units.
    """

    asked: int
    removed: int
    num_parameters: int
    sparsity: float
    heads: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    experts: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout, keep: torch.Tensor, asked: int) -> Achieved:
        """Measure a mask, bool [P]."""
        removed = layout.num_removed_parameters(keep)
        layers = layout.decoder.num_layers
        heads, widths, experts = [(0, 0)] * layers, [0] * layers, [0] * layers
        for block, kept in layout.keep_by_block(keep):
            if isinstance(block, AttentionBlock):
                parts = block.kept_parts(kept)
                heads[block.layer] = int(kept.sum()), int(parts[block.num_heads :].sum())
            elif isinstance(block, ExpertsBlock) and block.unit == "expert":
                experts[block.layer] = int(kept.sum())
            else:
                widths[block.layer] = int(kept.sum())
        return cls(
            asked=asked,
            removed=removed,
            num_parameters=layout.num_model_parameters - removed,
            sparsity=removed / layout.num_decoder_parameters,
            heads=tuple(heads),
            widths=tuple(widths),
            experts=tuple(experts),
        )

    @property
    def within_tolerance(self) -> bool:
        """Whether at most 0.5 % of the request is missing."""
        return self.asked - self.removed <= TOLERANCE * self.asked


def finish(
    layout: Layout,
    keep: torch.Tensor,
    relevance: torch.Tensor,
    budget: int,
    *,
    head_layout: HeadLayout = "rectangular",
    round_to: int | Literal["auto"] = "auto",
    uniform: bool = False,
) -> tuple[torch.Tensor, Achieved]:
    """Make heads rectangular, round widths, and use up the budget without exceeding it.

    Heads come first, then widths, which use what heads leave of the budget. Then small exchanges
    between sub-layers follow, until at most 0.5 % of the budget is left
    (`Achieved.within_tolerance`) or no exchange fits.

    Args:
        keep: bool [P], within the budget.
        relevance: float [P], of removed units too, on one scale, since units may be restored; +inf:
            the unit is kept.
        budget: parameters to remove in all, at most.
        head_layout: "rectangular": a layer's KV heads serve equally many query heads; "free": heads
            are not changed.
        round_to: MLP widths become multiples of this; "auto": see `auto_multiple`; 1: no rounding.
        uniform: the same heads and widths, or experts, in all layers; implies rectangular heads.
    Returns:
        bool [P], and its size.
    Raises:
        ValueError: an argument is not as described, or no uniform shape is within the budget.
    """
    if head_layout not in get_args(HeadLayout):
        raise ValueError(
            f"head_layout: expected one of {get_args(HeadLayout)}, got {head_layout!r}"
        )
    if round_to != "auto" and (not isinstance(round_to, int) or round_to < 1):
        raise ValueError(f"round_to: expected a positive whole number or 'auto', got {round_to!r}")
    check_within(layout.num_removed_parameters(keep), budget)
    multiple = auto_multiple(layout) if round_to == "auto" else round_to
    if uniform:
        keep = make_uniform(layout, keep, relevance, budget=budget, multiple=multiple)
        return keep, Achieved.of(layout, keep, budget)
    if head_layout == "rectangular":
        keep = make_rectangular(layout, keep, relevance)
    keep = round_widths(layout, keep, relevance, multiple=multiple, budget=budget)
    tolerance = int(TOLERANCE * budget)
    keep = fill(
        layout,
        keep,
        relevance,
        budget=budget,
        tolerance=tolerance,
        multiple=multiple,
        head_layout=head_layout,
    )
    return drop_empty(layout, keep), Achieved.of(layout, keep, budget)
