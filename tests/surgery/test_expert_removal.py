"""Removed experts: the smaller model equals the masked parent, in memory and on disk."""

from __future__ import annotations

import pytest
import torch
from mixtures import MIXTURES
from surgery_cases import difference, logits_of, tokens

from bonsai_fast.models import ExpertsBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import masked
from bonsai_fast.surgery import kept_positions, remove_units


def keep_experts(layout: Layout, count: int) -> torch.Tensor:
    """Other experts of every layer, equally many."""
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in layout.groups:
        if group.kind == "expert":
            order = torch.randperm(
                len(group), generator=torch.Generator().manual_seed(group.layer + 1)
            )
            keep[group.start + order[count:]] = False
    return keep


@pytest.mark.parametrize("count", [4, 2])
@pytest.mark.parametrize("family", MIXTURES)
def test_equal_counts_stay_in_the_stock_class(family: str, count: int) -> None:
    """Fewer than the 3 that a token passes: then it passes fewer."""
    model, input_ids = MIXTURES[family](), tokens()
    layout = Layout.of(model)
    keep = keep_experts(layout, count)
    smaller = remove_units(model, layout, keep)
    assert type(smaller) is type(model)
    assert smaller.config.num_experts_per_tok == min(3, count)
    with masked(model, layout, keep.expand(len(input_ids), -1)):
        wanted = logits_of(model, input_ids)
    assert difference(logits_of(smaller, input_ids), wanted) < 1e-5 * float(wanted.abs().max())
    removed = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in smaller.parameters()
    )
    assert removed == layout.num_removed_parameters(keep)
    again = Layout.of(smaller)
    assert all(block.num_experts == count for block in again.decoder.experts.values())
    experts = [layer["experts"] for layer in kept_positions(layout, keep) if "experts" in layer]
    assert all(len(kept) == count for kept in experts) and len(experts) == len(
        layout.decoder.experts
    )


@pytest.mark.parametrize("family", MIXTURES)
def test_equal_widths_of_experts_stay_in_the_stock_class(family: str) -> None:
    """Not where the width of shared experts follows from that of the others."""
    model, input_ids = MIXTURES[family](), tokens()
    layout = Layout.of(model, experts="channel")
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in layout.groups:
        if isinstance(group.block, ExpertsBlock):
            gone = torch.randperm(len(group), generator=torch.Generator().manual_seed(group.layer))
            keep[group.start + gone[:4]] = False
    smaller = remove_units(model, layout, keep)
    if family == "glm4_moe":
        assert type(smaller).__name__ == "BonsaiGlm4MoeForCausalLM"
    else:
        assert type(smaller) is type(model)
    with masked(model, layout, keep.expand(len(input_ids), -1)):
        wanted = logits_of(model, input_ids)
    assert difference(logits_of(smaller, input_ids), wanted) < 1e-5 * float(wanted.abs().max())
    removed = model.num_parameters() - smaller.num_parameters()
    assert removed == layout.num_removed_parameters(keep)


def test_widths_that_grouped_products_cannot_have_are_refused() -> None:
    model = MIXTURES["mixtral"]()
    layout = Layout.of(model, experts="channel")
    keep = torch.ones(len(layout), dtype=torch.bool)
    keep[next(g.start for g in layout.groups if g.kind == "channel" and g.layer == 2)] = False
    with pytest.raises(ValueError, match=r"layer 2: expected a multiple of 8 channels .* got 19"):
        remove_units(model, layout, keep)
